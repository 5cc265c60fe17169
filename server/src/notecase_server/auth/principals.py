"""Gives principals opaque names in events. The meaning of a name is in a separate row, which can be erased."""

from collections import OrderedDict
from collections.abc import Callable

from notecase import v1

from notecase_server import names
from notecase_server.auth.principal import Principal
from notecase_server.store.contract import PrincipalStore

KNOWN_PRINCIPALS = 10_000
"""How many are remembered, so that each costs the store a write once."""


class Principals:
    """The principals of one server by the names that events have for them."""

    def __init__(self, store: PrincipalStore, new_id: Callable[[], str]) -> None:
        self._store = store
        self._new_id = new_id
        self._known: OrderedDict[tuple[str, Principal], str] = OrderedDict()
        self._changes = 0

    async def name(self, principal: Principal, tenant: str) -> str:
        """Returns the principal's name in stored data, principals/{principal}, once the store has its row; "" for a
        caller without credentials. Raises NotecaseError STORE_UNAVAILABLE."""
        if not principal.subject:
            return ""
        place = tenant, principal
        if (name := self._known.get(place)) is not None:
            self._known.move_to_end(place)
            return name
        changes = self._changes
        row = await self._store.know_principal(tenant, self._row(principal))
        if changes == self._changes:  # else the row may have been erased since
            self._known[place] = row.name
            if len(self._known) > KNOWN_PRINCIPALS:
                self._known.popitem(last=False)
        return row.name

    def _row(self, principal: Principal) -> v1.Principal:
        return v1.Principal(
            name=names.principal(self._new_id()),
            subject=principal.subject,
            role=v1.Key.Role.Value(f"ROLE_{principal.role.name}"),
            user=f"users/{principal.user}" if principal.user else "",
            display_name=principal.display_name,
        )

    def forget(self) -> None:
        """Empties the cache, since rows were erased."""
        self._changes += 1
        self._known.clear()
