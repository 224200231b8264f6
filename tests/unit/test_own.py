"""A user's model file as it is read before a run: without importing it, each refusal in one line."""

from pathlib import Path

import pytest

from images import own
from images.errors import UsageError

TEXT = """
raise SystemExit("nobody imports this")
requirements = ["scikit-learn==1.9.1", "joblib[x]==1.6"]

class Mine:
    name: str = "mine-1"
"""


def read(folder: Path, text: str, name: str = "Mine") -> own.Own:
    (folder / "my.model.py").write_text(text)
    return own.read(f"{folder}/my.model.py:{name}")


def test_a_file_is_read_and_not_imported(tmp_path: Path) -> None:
    found = read(tmp_path, TEXT)
    assert (found.name, found.class_name, found.requirements) == (
        "mine-1",
        "Mine",
        ("scikit-learn==1.9.1", "joblib[x]==1.6"),
    )
    assert found.inside == "/opt/app/model/my.model.py:Mine"
    assert own.read(found.word) == found
    assert read(tmp_path, 'class Mine:\n name = "a"').requirements == ()


def test_a_word_names_a_file_exactly_when_it_ends_in_py() -> None:
    assert own.is_file("a/b.py:C") and own.is_file("x:y.py:C")
    assert not any(map(own.is_file, ("knn", "knn:data=x.py", "a.py", "a.pyc:C", "")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("class Other: ...", "has no class 'Mine'; its classes are: Other"),
        ("class (", "is no Python: invalid syntax"),
        ("class Mine: ...", "wants a name = .* found None"),
        ("class Mine:\n name = 'a b'", "found 'a b'"),
        ("class Mine:\n name = f()", "2: name wants to be written out"),
        (TEXT.replace("==1.9.1", ">=1.9.1"), "requirements = .*found .*>=1.9.1"),
        (TEXT.replace('["scikit', '["--index-url=x==1", "scikit'), "requirements = "),
        (TEXT.replace('["scikit-learn==1.9.1", "joblib[x]==1.6"]', '"scikit-learn==1.9.1"'), "requirements = "),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"nowhere\.py could not be read: No such file"):
        own.read("nowhere.py:Mine")
