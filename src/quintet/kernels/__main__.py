"""`python -m quintet.kernels` compiles the kernels and prints what they are."""

from quintet.kernels.report import report

if __name__ == "__main__":
    print(report())
