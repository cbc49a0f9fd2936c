import subprocess
import sys


def test_importing_and_encoding_load_nothing_heavy(trained: object) -> None:
    code = (
        "import sys; from quintet.tokenization import load; "
        f"t = load({str(trained)!r}); t.decode(t(['a', 'b c'])['input_ids']); "
        "print([m for m in ('torch', 'numpy', 'jinja2', 'huggingface_hub', 'transformers') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
