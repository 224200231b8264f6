"""A model of one's own: scikit-learn's iris data, one decision tree. docs/models.md explains it.

python -m server --model docs/examples/iris.py:Iris
isolatency run --model docs/examples/iris.py:Iris --data docs/examples/iris.npz
"""

import numpy as np

requirements = ["scikit-learn==1.9.1"]  # what goes into every target's tree with this file


class Iris:
    name = "iris"
    inputs = (("x", "FP32", (-1, 4)),)
    outputs = (("label", "INT64", (-1,)), ("probabilities", "FP64", (-1, 3)))

    def load(self):
        from sklearn.datasets import load_iris
        from sklearn.tree import DecisionTreeClassifier

        rows, labels = load_iris(return_X_y=True)
        self._tree = DecisionTreeClassifier(max_depth=3, random_state=0).fit(rows.astype(np.float32), labels)

    def predict(self, batch):
        probabilities = self._tree.predict_proba(batch.inputs["x"])
        return {"label": probabilities.argmax(axis=1), "probabilities": probabilities}
