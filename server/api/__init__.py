"""HTTP endpoints, one module a family. Knows no tensors."""
