"""Why a method stays behind, where the literature says so: (names of cases, the reason with its source)."""

REASONS: tuple[tuple[tuple[str, ...], str], ...] = ()
