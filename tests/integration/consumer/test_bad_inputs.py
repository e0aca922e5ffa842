"""Bad inputs that a database could refuse, on PostgreSQL."""

from tests.unit.consumer.test_bad_inputs import (  # noqa: F401
    _quick,
    test_p15_any_key_is_kept_also_where_its_message_fails,
    test_p16_many_large_doubled_and_forged_headers_are_kept_and_command_nothing,
    test_p18_a_very_large_body_is_handled_or_a_letter,
    test_p19_an_id_that_cannot_be_kept_is_a_letter,
)
