"""The two HTTP interfaces: the OpenAI endpoint and the admin socket."""
