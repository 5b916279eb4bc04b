"""A page that draws from a pipeline and steers it by hand; `python -m improved_ldm.demo` opens it."""
