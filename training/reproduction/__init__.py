"""The paper's tables at a size that a reader can afford: what each compares, its runs, its measures, its report."""
