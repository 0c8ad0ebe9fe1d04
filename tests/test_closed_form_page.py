"""The page on closed-form heads: labels of test tasks choose nothing."""

from __future__ import annotations

from pages import mix_test_characters, negate_sinusoids, run_until


def test_rates_and_strengths_are_chosen_without_labels_of_test_tasks(small):
    before = run_until("closed_form", "shown_chars")
    mix_test_characters(small)
    negate_sinusoids(small, before["TEST"])
    after = run_until("closed_form", "shown_chars")
    assert before["TEST"] == 1002 and len(before["chosen"]) == len(before["WAYS"])
    assert before["chosen"] == after["chosen"]
    assert before["settings"] == after["settings"] and before["qualities"] == after["qualities"]
    for name, kept in before["curves"].items():
        assert kept["runs"] != after["curves"][name]["runs"]  # the change was seen
