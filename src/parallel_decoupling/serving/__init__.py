"""Embeddings over HTTP in OpenAI's form, and a page to look at an index."""
