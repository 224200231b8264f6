"""The models that a run may name, and the rows that they are asked."""

from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "server" / "models" / "data"
NAMES = ("knn", "knn-digits", "knn-mnist", "dnn", "null", "spin", "work")
SPELLED = {"knn:data=cancer": "knn", "knn:data=digits": "knn-digits", "knn:data=mnist": "knn-mnist"}
LIKE_NULL = ("null", "spin", "work")  # they answer 1 for each row, whatever is in it


def name(word: str) -> str:
    """The name under which the server serves what --model says."""
    return SPELLED.get(word, word)
