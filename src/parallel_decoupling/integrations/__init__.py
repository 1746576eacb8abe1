"""Other libraries on top of an ``Embedder``; each module needs the extra that it names."""
