"""What a capture costs beside its teacher, on workers, in text, and with very many shards."""
