"""`python -m kvhive_vllm` is the command `kvhive-vllm`."""

from kvhive_vllm.cli import main

if __name__ == "__main__":
    main()
