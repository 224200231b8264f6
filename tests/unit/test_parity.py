"""Parity: each difference is found and named; what emulation cannot help is a caveat."""

from typing import Any

import numpy as np

from hostsetup.target import Endpoint, Spec
from loadtest._parity import Facts, Parity, compare

SAME: dict[str, Any] = {"schema": 1, "tree_sha256": "aa", "blas_kernel": "Zen", "blas_threads": 1}
OUTPUTS = {
    "knn": {"label": np.array([0, 1, 1])},
    "dnn": {"label": np.array([3, 4]), "probabilities": np.array([[0.25, 0.75], [0.5, 0.5]])},
}


def facts(
    name: str, identity: dict[str, Any] | None, *, accel: str | None = None, outputs: Any = None, **options: Any
) -> Facts:
    kind = "qemu" if accel else "process"
    endpoint = Endpoint(name, kind, "http://127.0.0.1:1", accel, accel is not None, identity, 0.1)
    return Facts(endpoint, Spec(name, kind, options=options), outputs or OUTPUTS)


def test_equal_targets_have_neither_differences_nor_caveats() -> None:
    found = compare(facts("a", SAME), facts("b", SAME))
    assert (found.differences, found.caveats) == ([], [])


def test_each_difference_of_identity_is_named() -> None:
    for key, value, words in (
        ("tree_sha256", "bb", "tree sha256: a has aa, b has bb"),
        ("blas_kernel", "Haswell", "BLAS kernel: a has Zen, b has Haswell"),
        ("blas_threads", 2, "BLAS threads: a has 1, b has 2"),
    ):
        assert compare(facts("a", SAME), facts("b", SAME | {key: value})).differences == [words]


def test_a_digest_that_nobody_knows_is_no_equality() -> None:
    unknown = SAME | {"tree_sha256": None}
    assert compare(facts("a", unknown), facts("b", unknown)).differences == ["tree sha256: a has None, b has None"]


def test_a_url_target_outside_of_a_tree_is_said_and_not_stopped() -> None:
    unknown = SAME | {"tree_sha256": None}
    there = Facts(facts("a", unknown).endpoint, Spec("a", "url"), OUTPUTS)
    found = compare(there, there)
    assert found.differences == [] and "outside of any tree" in found.caveats[0]
    assert compare(facts("p", SAME), there).differences == ["tree sha256: p has aa, a has None"]


def test_an_emulated_cpu_may_pick_another_blas_kernel_but_not_another_tree() -> None:
    found = compare(facts("a", SAME), facts("qemu", SAME | {"blas_kernel": "Haswell"}, accel="tcg"))
    assert found.differences == []
    assert "qemu-tcg has Haswell" in found.caveats[0]
    assert compare(facts("a", SAME), facts("q", SAME | {"tree_sha256": "bb"}, accel="tcg")).differences


def test_a_kernel_of_its_own_exempts_from_the_digest_but_not_from_the_answers() -> None:
    other = dict(OUTPUTS, knn={"label": np.array([0, 1, 0])})
    found = compare(facts("a", SAME), facts("b", SAME | {"tree_sha256": "bb"}, outputs=other, kernel="/k"))
    assert found.differences == ["knn: 1 of 3 values of label differ between a and b"]
    assert "digest check does not apply" in found.caveats[0]


def test_an_unknown_server_is_compared_by_its_answers_alone() -> None:
    found = compare(facts("a", SAME), facts("prod", None))
    assert found.differences == []
    assert "unknown server" in found.caveats[0]


def test_probabilities_may_differ_by_a_ten_thousandth() -> None:
    def moved(by: float) -> list[str]:
        outputs = dict(OUTPUTS, dnn={**OUTPUTS["dnn"], "probabilities": OUTPUTS["dnn"]["probabilities"] + by})
        return compare(facts("a", SAME), facts("b", SAME, outputs=outputs)).differences

    assert moved(0.9e-4) == []
    assert len(moved(1.1e-4)) == 1
    assert len(moved(float("nan"))) == 1


def test_a_missing_or_misshapen_output_is_a_difference() -> None:
    less = dict(OUTPUTS, dnn={"label": OUTPUTS["dnn"]["label"]})
    assert "probabilities" in compare(facts("a", SAME), facts("b", SAME, outputs=less)).differences[0]


def test_what_a_target_was_told_for_itself_is_said_and_its_answers_are_still_compared() -> None:
    other = facts("b", SAME, spin_us=210.0)
    assert compare(facts("a", SAME), other).differences == []
    assert "b: its server was told spin_us=210.0" in compare(facts("a", SAME), other).caveats[0]
    wrong = facts("b", SAME, outputs=dict(OUTPUTS, knn={"label": np.array([0, 1, 0])}), spin_us=210.0)
    assert len(compare(facts("a", SAME), wrong).differences) == 1


def checked(*several: Facts) -> tuple[list[str], list[str], list[str]]:
    parity = Parity()
    found = [parity.check(facts) for facts in several]
    differences = [line for one in found for line in one.differences]
    return differences, [line for one in found for line in one.caveats], parity.unchecked()


def test_a_binary_of_its_own_exempts_the_first_target_too() -> None:
    own = facts("a", SAME | {"tree_sha256": "bb"}, binary="/b")
    differences, caveats, unchecked = checked(own, facts("b", SAME), facts("c", SAME))
    assert (differences, unchecked) == ([], [])
    assert caveats == ["a: binary of its own; the digest check does not apply to it"]
    differences, _, _ = checked(own, facts("b", SAME), facts("c", SAME | {"tree_sha256": "cc"}))
    assert differences == ["tree sha256: b has aa, c has cc"]


def test_the_answers_of_the_first_target_are_compared_whatever_it_is() -> None:
    other = dict(OUTPUTS, knn={"label": np.array([0, 1, 0])})
    for first in (facts("a", SAME, outputs=other, kernel="/k"), facts("a", None, outputs=other)):
        assert checked(first, facts("b", SAME))[0] == ["knn: 1 of 3 values of label differ between a and b"]


def test_after_an_unknown_server_the_others_are_compared_with_each_other() -> None:
    assert checked(facts("prod", None), facts("b", SAME), facts("c", SAME | {"blas_threads": 2}))[0] == [
        "BLAS threads: b has 1, c has 2"
    ]


def test_that_no_digest_was_compared_is_said() -> None:
    assert "no digest was compared" in checked(facts("a", SAME, image="x"), facts("b", SAME, image="y"))[2][0]
    assert checked(facts("a", SAME, image="x"))[2] == []
    assert checked(facts("a", SAME), facts("b", SAME, image="y"))[2] == []


def test_outputs_of_another_type_are_a_difference() -> None:
    texts = {
        "knn": {"label": np.array(["0", "1", "1"])},
        "dnn": {**OUTPUTS["dnn"], "probabilities": np.array([["a"] * 2] * 2)},
    }
    found = compare(facts("a", SAME), facts("b", SAME, outputs=texts)).differences
    assert [line.split(":")[0] for line in sorted(found)] == ["dnn", "knn"]
    assert len(compare(facts("a", SAME, outputs=texts), facts("b", SAME)).differences) == 2
