"""The description of the HTTP API: what may be sent, every status that can come, and the body of each."""
