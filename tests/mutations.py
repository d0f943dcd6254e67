"""Damaged files, made from good ones: cut short, with bits flipped, spliced, repeated, blown up."""

from hypothesis import strategies as st


def flip_bits(data, positions):
    damaged = bytearray(data)
    for position in positions:
        damaged[position // 8 % len(damaged)] ^= 1 << position % 8
    return bytes(damaged)


def splice(data, other, start, stop):
    """Put a part of another file in."""
    return data[: start % len(data)] + other[stop % len(other) :]


def overwrite(data, at, value):
    """Forge a field of four or eight bytes."""
    at %= len(data)
    return data[:at] + value + data[at + len(value) :]


_FORGED = [b"\xff" * 4, b"\x7f" + b"\xff" * 3, b"\0" * 4, b"\xff" * 8, b"\x80" + b"\0" * 7]


def damaged(files):
    """Strategy of damaged files; `files` are good ones."""
    good = st.sampled_from(files)
    place = st.integers(0, 1 << 20)
    # Most of what a decoder believes stands in the first few hundred bytes.
    header_bits = st.lists(st.integers(0, 8 * 400), min_size=1, max_size=20)
    any_bits = st.lists(st.integers(0, 1 << 23), min_size=1, max_size=60)
    return st.one_of(
        st.builds(lambda data, at: data[: at % len(data)], good, place),
        st.builds(flip_bits, good, header_bits),
        st.builds(flip_bits, good, any_bits),
        st.builds(splice, good, good, place, place),
        st.builds(lambda data, at: data[:at] + data, good, place),
        st.builds(overwrite, good, st.integers(0, 400), st.sampled_from(_FORGED)),
    )
