"""Bad inputs that a database could refuse, on PostgreSQL."""

from tests.unit.consumer.test_bad_inputs import (  # noqa: F401
    _quick,
    test_p14_bytes_that_are_no_text_are_a_letter_in_what_is_text_and_kept_elsewhere,
    test_p15_any_key_is_kept_also_where_its_message_fails,
    test_p16_many_large_doubled_and_forged_headers_are_kept_and_command_nothing,
    test_p17_no_body_and_an_empty_one_are_letters_of_a_typed_handler_and_not_of_a_raw_one,
    test_p18_a_very_large_body_is_handled_or_a_letter,
    test_p19_an_id_that_cannot_be_kept_is_a_letter,
    test_p21_text_that_commands_a_terminal_a_page_or_a_log_is_kept_as_it_is,
)
