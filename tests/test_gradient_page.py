"""The page on the gradient-based family: labels of test tasks choose nothing."""

from __future__ import annotations

from pages import mix_test_characters, negate_sinusoids, run_until


def test_rates_and_steps_are_chosen_without_labels_of_test_tasks(small):
    before = run_until("gradient", "table")
    mix_test_characters(small)
    negate_sinusoids(small, before["TEST"])
    after = run_until("gradient", "table")
    assert before["TEST"] == 1002 and len(before["RATES"]) == len(before["MEMBERS"])
    for name in ("RATES", "CHOSEN", "settings"):
        assert before[name] and before[name] == after[name]
    for name, kept in before["sines"].items():
        assert kept["steps"] == after["sines"][name]["steps"]
        assert kept["tuning"] == after["sines"][name]["tuning"]
        assert kept["runs"] != after["sines"][name]["runs"]  # the change was seen
