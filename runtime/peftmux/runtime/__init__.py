"""The serving engine and its gRPC server."""
