"""Random databases and queries, so that a cost model can learn before it meets a real database."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_COLUMN_KINDS = ("integer", "float", "text", "date")
_AGGREGATES = ("sum", "avg", "min", "max")


@dataclass(frozen=True)
class GeneratedColumn:
    """A column: its kind and how many different values it draws from."""

    name: str
    kind: str
    distinct: int


@dataclass(frozen=True)
class GeneratedTable:
    """A table with a key `id`, columns, and foreign keys `<parent>_id` to earlier tables.

    Args:
        parents: the tables that its foreign keys point to.
        key_types: the type of each foreign key: BIGINT as the key that it points to, or INTEGER.
    """

    name: str
    rows: int
    columns: tuple[GeneratedColumn, ...]
    parents: tuple[str, ...]
    key_types: tuple[str, ...]


@dataclass(frozen=True)
class GeneratedDatabase:
    """A schema; the same seed gives the same schema and data."""

    seed: int
    tables: tuple[GeneratedTable, ...]

    def create(self, connection: Any) -> None:
        """Make and fill the tables in an open DuckDB connection."""
        for number, table in enumerate(self.tables):
            salt = self.seed * 1009 + number * 101
            parents = {other.name: other.rows for other in self.tables}
            values = ["range AS id"]
            values += [
                f"{_spread(salt + place, parents[name], key_type)} AS {name}_id"
                for place, (name, key_type) in enumerate(zip(table.parents, table.key_types, strict=True))
            ]
            values += [
                f"{_value(column, salt + 50 + place)} AS {column.name}" for place, column in enumerate(table.columns)
            ]
            connection.execute(f"CREATE TABLE {table.name} AS SELECT {', '.join(values)} FROM range({table.rows})")


def generate_database(seed: int, largest: int = 300_000) -> GeneratedDatabase:
    """A schema of 3 to 6 tables of 10^3 to `largest` rows and 3 to 8 columns, linked by foreign keys.

    Half of the foreign keys are narrower than the keys they point to: with a cast between them DuckDB plans EXISTS as
    a join with distinct keys, with none as a semi join.

    Raises:
        ValueError: `largest` is below 1000.
    """
    if largest < 1000:
        raise ValueError(f"`largest` must be at least 1000 rows, got {largest}.")
    draw = random.Random(seed)
    draw_types = random.Random(f"{seed} types of foreign keys")  # apart, so that a seed keeps its tables and rows
    tables: list[GeneratedTable] = []
    for number in range(draw.randint(3, 6)):
        columns = tuple(
            GeneratedColumn(f"c{place}", draw.choice(_COLUMN_KINDS), int(10 ** draw.uniform(0.5, 4)))
            for place in range(draw.randint(3, 8))
        )
        earlier = [table.name for table in tables]
        parents = tuple(draw.sample(earlier, min(len(earlier), draw.randint(1, 2))))
        rows = int(1000 * (largest / 1000) ** draw.random())
        key_types = tuple(draw_types.choice(("BIGINT", "INTEGER")) for _ in parents)
        tables.append(GeneratedTable(f"t{number}", rows, columns, parents, key_types))
    return GeneratedDatabase(seed, tuple(tables))


def generate_queries(database: GeneratedDatabase, count: int, seed: int = 0) -> Iterator[str]:
    """Queries with 0 to 3 joins along foreign keys, 0 to 3 predicates, and aggregates, groups, orders and limits.

    Some joins are outer ones; some queries ask, by EXISTS or IN, whether a linked row is there or is not, which DuckDB
    plans as semi, anti and mark joins; some aggregates are of computed values; some groups are
    of two columns, of keys, or kept by what they sum to.
    """
    draw = random.Random(f"{database.seed} {seed}")
    for _ in range(count):
        yield _query(database, draw)


def _query(database: GeneratedDatabase, draw: random.Random) -> str:
    by_name = {table.name: table for table in database.tables}
    used = [draw.choice(database.tables)]
    source = used[0].name
    for _ in range(draw.randint(0, 3)):
        links = [(table, parent) for table in used for parent in table.parents if by_name[parent] not in used]
        if not links:
            break
        table, parent = draw.choice(links)
        join = draw.choice(("JOIN", "JOIN", "JOIN", "JOIN", "LEFT JOIN"))
        source += f" {join} {parent} ON {table.name}.{parent}_id = {parent}.id"
        used.append(by_name[parent])
    columns = [(f"{table.name}.{column.name}", column) for table in used for column in table.columns]
    chosen = [draw.choice(columns) for _ in range(draw.randint(0, 3))]
    conditions = [_condition(name, column, draw) for name, column in chosen]
    conditions += _existence(database, used, draw)
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    numbers = [name for name, column in columns if column.kind in ("integer", "float")] or [f"{used[0].name}.id"]
    sums = [f"{draw.choice(_AGGREGATES)}({_number(numbers, draw)})" for _ in range(draw.randint(1, 3))]
    shape = draw.choice(("total", "group", "group", "top"))
    if shape == "total":
        return f"SELECT count(*), {', '.join(sums)} FROM {source}{where}"
    name, _ = draw.choice(columns)
    if shape == "top":
        limit = draw.choice((10, 100, 1000))
        return f"SELECT {used[0].name}.id, {name} FROM {source}{where} ORDER BY {name} LIMIT {limit}"
    keys = draw.choice(([name], [name], [name], [name, draw.choice(columns)[0]], [f"{used[-1].name}.id"]))
    keys = list(dict.fromkeys(keys))
    having = draw.choice(("", "", "", f" HAVING {sums[0]} > {draw.randint(1, 200)}"))
    ordered = draw.choice(("", f" ORDER BY {len(keys) + 1} DESC", f" ORDER BY {len(keys) + 1} DESC LIMIT 10"))
    named = ", ".join(keys)
    return f"SELECT {named}, {', '.join(sums)} FROM {source}{where} GROUP BY {named}{having}{ordered}"


def _existence(database: GeneratedDatabase, used: list[GeneratedTable], draw: random.Random) -> list[str]:
    """Now and then, that a row of another table, linked to one of these by a foreign key, is there or is not."""
    by_name = {table.name: table for table in database.tables}
    keys = [
        ((by_name[parent], f"{parent}.id"), (table, f"{table.name}.{parent}_id"))
        for table in database.tables
        for parent in table.parents
    ]
    links = [
        (outside, inside)
        for ends in keys
        for outside, inside in (ends, ends[::-1])
        if outside[0] in used and inside[0] not in used
    ]
    if not links or draw.random() < 0.75:
        return []
    (_, key), (other, link) = draw.choice(links)
    asked = [draw.choice(other.columns) for _ in range(draw.randint(0, 2))]
    conditions = [_condition(f"{other.name}.{column.name}", column, draw) for column in asked]
    negation = draw.choice(("", "", "", "NOT "))
    if draw.random() < 0.5:
        where = " AND ".join([f"{link} = {key}", *conditions])
        return [f"{negation}EXISTS (SELECT * FROM {other.name} WHERE {where})"]
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    return [f"{key} {negation}IN (SELECT {link} FROM {other.name}{where})"]


def _number(names: list[str], draw: random.Random) -> str:
    """What an aggregate is of: a column, or something computed of two."""
    first, second = draw.choice(names), draw.choice(names)
    return draw.choice(
        (first, first, first, f"{first} * (1 - {second})", f"{first} + {second}", f"{first} * {second}")
    )


def _condition(name: str, column: GeneratedColumn, draw: random.Random) -> str:
    value = draw.randrange(column.distinct)
    if column.kind == "text":
        return draw.choice(
            (f"{name} = 'value {value}'", f"{name} LIKE '%{value % 100}%'", f"{name} LIKE 'value {value % 10}%'")
        )
    if column.kind == "date":
        return f"{name} {draw.choice('<>')} DATE '2000-01-01' + {value}"
    if column.kind == "integer" and draw.random() < 0.4:
        return draw.choice((f"{name} = {value}", f"{name} IN ({value}, {value // 2}, {value // 3})"))
    if draw.random() < 0.2:
        return f"{name} BETWEEN {value // 2} AND {value}"
    return f"{name} {draw.choice('<>')} {value}"


def _spread(salt: int, count: int, data_type: str = "INTEGER") -> str:
    """A number in [0, count) for each row, as if drawn by chance."""
    return f"(hash(range + {salt * 1000003}) % {count})::{data_type}"


def _value(column: GeneratedColumn, salt: int) -> str:
    number = _spread(salt, column.distinct)
    return {
        "integer": number,
        "float": f"{number}::DOUBLE + 0.5",
        "text": f"'value ' || {number}",
        "date": f"DATE '2000-01-01' + {number}",
    }[column.kind]
