"""Token shards: formats, order, cursor, loader, preparation."""
