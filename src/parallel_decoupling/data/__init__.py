"""MMEB on disk, the training mixture, tokenisation, the embedded benchmark."""
