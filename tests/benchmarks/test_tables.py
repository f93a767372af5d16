"""No number in a README that a committed file did not produce."""

from diffpress.benchmarks import tables


def test_every_table_is_what_the_committed_results_say() -> None:
    for file in tables.FILES:
        text = file.read_text("utf-8")
        assert "<!-- table:" in text or file.suffix in (".yaml", ".svg"), file
        assert text == tables.filled(file), f"{file}: run python -m diffpress.benchmarks.tables"
