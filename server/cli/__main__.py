"""`python -m server.cli` is `speechllm`."""

from server.cli import app

if __name__ == "__main__":
    app(prog_name="speechllm")
