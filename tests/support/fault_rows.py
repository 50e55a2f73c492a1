"""Tests that tell a row of the table of faults (tables M, H and U), and are called otherwise: `-k fault_h1` picks them.

Most tests of a row have it in their names. These were there before, and what they are called says what they are about.
"""

from __future__ import annotations

ROWS: dict[str, tuple[str, ...]] = {
    "h1": (
        "unit/test_overwritten_index.py::test_overwritten_index_before_the_save_fails_that_channel_alone",
        "unit/test_overwritten_index.py::test_overwritten_index_after_the_save_makes_that_channel_anew_alone",
    ),
    "h2": (
        "unit/test_state_hostile.py::test_a_number_of_64_bits_in_a_request_can_be_saved",
        "unit/test_state_hostile.py::test_sequences_wrap_and_losses_stop_at_64_bits",
    ),
    "h3": (
        "unit/test_backpressure.py::test_backpressure_a_guest_that_reads_no_answers_is_no_longer_read",
        "loopback/test_hostile_guests.py::test_backpressure_on_a_guest_that_reads_nothing",
    ),
    "h4": (
        "unit/test_backpressure_providers.py::"
        "test_the_largest_window_of_the_largest_packets_is_sent_in_slices_and_holds_what_is_documented",
        "unit/test_backpressure_providers.py::test_a_ring_full_of_requests_for_sub_channels_makes_no_turn_long",
    ),
    "h5": (
        "unit/test_state_hostile.py::test_what_is_no_chunk_is_refused",
        "unit/test_state_hostile.py::test_ranges_of_providers_are_checked_before_anything_changes",
        "unit/test_state_hostile.py::test_mutated_states_are_refused_or_restored",
    ),
    "h6": ("unit/test_state_hostile.py::test_limits_of_run_time_hold_while_decoding",),
    "h8": ("unit/test_qemu_save.py::test_a_device_that_does_not_answer_its_bar_is_noticed",),
    "h9": (
        "unit/test_complaints.py::test_a_guest_cannot_fill_the_log",
        "loopback/test_complaints.py::test_the_log_of_a_server_stays_short",
    ),
    "h15": (
        "loopback/test_vfio_user_memory.py::test_a_mapping_that_is_asked_for_again_keeps_no_descriptor",
        "loopback/test_vfio_user_memory.py::test_memory_whose_file_is_made_shorter_costs_the_client_its_connection",
    ),
    "h16": ("unit/test_state_hostile.py::test_a_state_is_read_from_a_plain_file_only",),
    "u5": (
        "unit/test_provision_qemu.py::test_explicit_accelerator",
        "unit/test_provision_qemu.py::test_kvm_that_is_asked_for_must_run_a_guest",
    ),
    "m5": ("unit/test_qemu_logs.py::test_the_logs_of_a_child_are_bounded_while_it_writes",),
}


def keywords(nodeid: str) -> set[str]:
    """Keywords of a test, beside its name. `nodeid`: as pytest has it, from the checkout on."""
    place = nodeid.partition("[")[0].removeprefix("tests/")
    return {f"fault_{row}" for row, tests in ROWS.items() if place in tests}
