"""The paper's tables, figures and theorem, made from nothing but data (Wang et al. 2019)."""
