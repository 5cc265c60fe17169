import sys

import pytest
from notecase import v1
from notecase_server.engine import instructions
from notecase_server.errors import NotecaseError


@pytest.mark.parametrize("source", ["", "You are a detective.", "50% of } is %}.", "é" * (32 << 10)], ids=len)
async def test_plain_text_is_its_own_result(source: str) -> None:
    assert await instructions.parsed(source) is None


@pytest.mark.parametrize("source", ["x" * (64 << 10) + "x", "é" * (32 << 10) + "x", "{{ a }}" + "x" * (64 << 10)])
async def test_one_that_is_too_long_is_refused_by_name(source: str) -> None:
    with pytest.raises(NotecaseError) as refused:
        await instructions.parsed(source, "start.settings.instruction")
    assert v1.ERROR_REASON_TEMPLATE_ERROR == refused.value.reason
    assert ["start.settings.instruction"] == [violation.field for violation in refused.value.violations]


async def test_a_template_is_parsed_once_its_language_is_loaded() -> None:
    found = await instructions.parsed("Dear {{ name }}")
    assert found is not None
    assert "Dear Ada" == await found.rendered({"session": {"name": v1.Value(string_value="Ada")}})
    assert "liquid" in sys.modules
