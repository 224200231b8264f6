"""Which models can be served, by name; what is not served is not imported."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports NumPy, which must come after the choice of its threads
    from server.models.base import Model

NAMES = ("knn", "dnn", "null")


def load(name: str) -> "Model":
    """The model of that name, ready to answer."""
    model: Model
    if name == "knn":
        from server.models.knn import KNN

        model = KNN()
    elif name == "dnn":
        from server.models.dnn import DNN

        model = DNN()
    else:
        from server.models.null import Null

        model = Null()
    model.load()
    model.warm_up()
    return model
