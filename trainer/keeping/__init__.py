"""What becomes of a snapshot once training has let go of it: arena -> local disk -> store, each by its own process.

Torch-free. Both processes may be killed at any moment and started again; what they were at is done again and then is
there once.
"""
