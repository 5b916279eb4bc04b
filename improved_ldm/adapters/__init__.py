"""The parts of `lora.py`: the files and names of adapters, their checks, and which adapters are active."""
