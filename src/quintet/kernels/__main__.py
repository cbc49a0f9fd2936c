"""`python -m quintet.kernels` compiles the kernels and reports on them."""

from quintet.kernels.report import report

if __name__ == "__main__":
    print(report())
