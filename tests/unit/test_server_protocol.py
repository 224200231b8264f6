"""The routes of the Open Inference Protocol v2, asked of a real server."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.unit.serving import ALL, DATA, Running, exchange, outputs, request, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("server"), *ALL) as running:
        yield running


@pytest.mark.parametrize(
    "path",
    [
        "/v2/health/live", "/v2/health/ready", "/v2/models/knn/ready", "/v2/models/knn/versions/1/ready",
        "/v2/models/dnn/ready", "/v2/models/null/ready",
    ],
)  # fmt: skip
def test_live_and_ready(server: Running, path: str) -> None:
    assert server.call("GET", path).status == 200


def test_server_metadata(server: Running) -> None:
    answer = server.call("GET", "/v2")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.json.keys() == {"name", "version", "extensions"}
    assert answer.json["name"] == "isolatency"
    assert all(isinstance(one, str) for one in answer.json["extensions"])


@pytest.mark.parametrize(
    ("model", "inputs", "given"),
    [
        (
            "knn",
            [("x", "FP32", [-1, 30])],
            [
                ("label", "INT64", [-1]),
                ("votes", "INT64", [-1]),
                ("neighbours", "INT64", [-1, -1]),
                ("distances", "FP64", [-1, -1]),
            ],
        ),
        ("dnn", [("x", "FP32", [-1, 784])], [("label", "INT64", [-1]), ("probabilities", "FP32", [-1, 10])]),
        ("null", [("x", "FP32", [-1, -1])], [("rows", "INT64", [-1])]),
    ],
)
def test_model_metadata(server: Running, model: str, inputs: list[object], given: list[object]) -> None:
    answer = server.call("GET", f"/v2/models/{model}")
    assert answer.json.keys() == {"name", "versions", "platform", "inputs", "outputs"}
    assert answer.json["name"] == model
    assert [(one["name"], one["datatype"], one["shape"]) for one in answer.json["inputs"]] == inputs
    assert [(one["name"], one["datatype"], one["shape"]) for one in answer.json["outputs"]] == given
    for version in answer.json["versions"]:
        assert server.call("GET", f"/v2/models/{model}/versions/{version}").json == answer.json


@pytest.mark.parametrize("model", ["knn", "dnn"])
def test_every_stored_row_gets_its_stored_label(server: Running, model: str) -> None:
    with np.load(DATA / f"{model}.npz") as stored:
        rows, labels = stored["rows"], stored["labels"]
    found = np.concatenate([outputs(server.infer(model, rows[i : i + 50]))["label"] for i in range(0, len(rows), 50)])
    assert np.array_equal(found, labels)


def test_an_answer_has_the_protocols_form(server: Running) -> None:
    rows = np.load(DATA / "knn.npz")["rows"][:3]
    answer = server.infer("knn", rows, id="a request")
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.json.keys() == {"model_name", "model_version", "id", "outputs"}
    assert answer.json["model_name"] == "knn"
    assert answer.json["id"] == "a request"
    for one in answer.json["outputs"]:
        assert one.keys() == {"name", "shape", "datatype", "data"}
        assert one["datatype"] == "INT64"
        assert one["shape"] == [3]
        assert len(one["data"]) == 3
    assert "id" not in server.infer("knn", rows).json


def test_probabilities_are_flat_rows_that_add_up(server: Running) -> None:
    rows = np.load(DATA / "dnn.npz")["rows"][:4]
    answer = server.infer("dnn", rows)
    found = outputs(answer)
    assert found["probabilities"].shape == (4, 10)
    assert found["probabilities"].sum(axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    assert np.array_equal(found["probabilities"].argmax(axis=1), found["label"])
    assert all(not isinstance(value, list) for one in answer.json["outputs"] for value in one["data"])


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (100, 30)])
def test_null_answers_1_for_each_row_of_any_width(server: Running, shape: tuple[int, int]) -> None:
    assert outputs(server.infer("null", np.zeros(shape)))["rows"].tolist() == [1] * shape[0]


def test_data_may_be_nested_or_flat_and_written_as_whole_numbers(server: Running) -> None:
    rows = np.round(np.load(DATA / "knn.npz")["rows"][:5])
    flat = request(rows)
    nested, whole = request(rows), request(rows)
    nested["inputs"][0]["data"] = rows.tolist()
    whole["inputs"][0]["data"] = rows.astype(int).ravel().tolist()
    answers = [server.call("POST", "/v2/models/knn/infer", body) for body in (flat, nested, whole)]
    assert [one.status for one in answers] == [200, 200, 200]
    assert answers[0].json == answers[1].json == answers[2].json


def test_only_the_outputs_asked_for_in_the_order_asked(server: Running) -> None:
    rows = np.load(DATA / "dnn.npz")["rows"][:1]

    def names(asked: list[str]) -> list[str]:
        answer = server.infer("dnn", rows, outputs=[{"name": name} for name in asked])
        return [one["name"] for one in answer.json["outputs"]]

    assert names(["probabilities", "label"]) == ["probabilities", "label"]
    assert names(["label"]) == ["label"]
    assert names([]) == ["label", "probabilities"]


def test_k_is_a_parameter_of_knn(server: Running) -> None:
    rows = np.load(DATA / "knn.npz")["rows"][:50]
    five = outputs(server.infer("knn", rows))
    assert np.array_equal(outputs(server.infer("knn", rows, parameters={"k": 5}))["votes"], five["votes"])
    one = outputs(server.infer("knn", rows, parameters={"k": 1}))
    assert one["votes"].tolist() == [1] * 50
    everybody = outputs(server.infer("knn", rows, parameters={"k": 569}))
    assert set(everybody["label"].tolist()) == {1}  # 357 of 569 are benign
    assert set(everybody["votes"].tolist()) == {357}


def test_neighbours_and_distances_come_to_those_who_name_them(server: Running) -> None:
    rows = np.load(DATA / "knn.npz")["rows"][:4]
    assert list(outputs(server.infer("knn", rows))) == ["label", "votes"]
    asked = {
        "outputs": [{"name": name} for name in ("distances", "neighbours")],
        "parameters": {"k": 3, "metric": "l2"},
    }
    found = outputs(server.infer("knn", rows, **asked))
    assert list(found) == ["distances", "neighbours"]
    known = np.load(DATA / "breast_cancer.npz")["rows"]
    assert np.array_equal(known[found["neighbours"][:, 0].astype(int)], rows)
    assert found["distances"].shape == (4, 3)
    assert not found["distances"][:, 0].any()
    assert (np.diff(found["distances"], axis=1) >= 0).all()


@pytest.mark.parametrize("model", ["knn", "dnn", "null"])
def test_a_version_may_be_named(server: Running, model: str) -> None:
    rows = np.load(DATA / f"{model}.npz")["rows"][:2]
    plain = server.infer(model, rows)
    version = plain.json["model_version"]
    named = server.call("POST", f"/v2/models/{model}/versions/{version}/infer", request(rows))
    assert named.json == plain.json


def test_a_row_is_answered_alike_alone_and_in_any_batch(server: Running) -> None:
    rows = np.load(DATA / "knn.npz")["rows"][:64]
    together = outputs(server.infer("knn", rows))
    for start, stop in [(0, 1), (5, 6), (7, 20), (63, 64)]:
        apart = outputs(server.infer("knn", rows[start:stop]))
        for name in ("label", "votes"):
            assert np.array_equal(apart[name], together[name][start:stop])


def test_many_connections_at_once_get_their_own_answers(server: Running) -> None:
    stored = {model: np.load(DATA / f"{model}.npz") for model in ("knn", "dnn")}

    def ask(number: int) -> bool:
        model = ("knn", "dnn")[number % 2]
        pick = np.random.default_rng(number).permutation(200)[: 1 + number % 9]
        answer = outputs(server.infer(model, stored[model]["rows"][pick], id=str(number)))
        return np.array_equal(answer["label"], stored[model]["labels"][pick])

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(200)))


def test_a_connection_is_kept(server: Running) -> None:
    connection = server.connect()
    body = request(np.load(DATA / "knn.npz")["rows"][:1])
    for _ in range(20):
        assert exchange(connection, "POST", "/v2/models/knn/infer", body).status == 200
        assert exchange(connection, "GET", "/v2/health/live", None).status == 200
        assert connection.sock is not None
    connection.close()


def test_a_large_batch_within_the_limit_is_answered(server: Running) -> None:
    rows = np.tile(np.load(DATA / "knn.npz")["rows"][:1], (4000, 1))
    assert outputs(server.infer("knn", rows))["label"].shape == (4000,)


def test_a_server_of_one_model_knows_only_that(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("server"), "--model", "null") as running:
        assert running.call("GET", "/v2/models/null/ready").status == 200
        assert running.call("GET", "/v2/models/knn/ready").status == 404
