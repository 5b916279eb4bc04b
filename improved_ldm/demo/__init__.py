"""A web page that samples from a pipeline with interactive control; `python -m improved_ldm.demo` opens it."""
