"""The OpenAI edge: schema, conversion, SSE frames, chat template."""
