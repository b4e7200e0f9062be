"""The router's gRPC edge: eLLM's own service and the Open Inference Protocol, by the path that HTTP takes."""
