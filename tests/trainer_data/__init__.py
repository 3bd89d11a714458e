"""Token data: formats, order, cursor, stream, preparation."""
