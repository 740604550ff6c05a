"""scikit-learn's digits as image folders."""
