"""The engines: how vLLM is started, brought to a point and fed, and which of them gets what."""
