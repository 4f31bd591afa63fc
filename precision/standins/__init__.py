"""Plain-PyTorch packages under the names of GPU libraries, importable only when this folder
is appended to sys.path (see precision.backend)."""
