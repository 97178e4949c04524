"""Keys that tell how often they were compared, to see that a search does not compare all pairs."""


def counting(kind):
    """A kind of str or int, and the list that grows with every comparison of such."""
    compared = []

    class Counted(kind):
        __hash__ = kind.__hash__

        def __eq__(self, other):
            compared.append(None)
            return kind.__eq__(self, other)

    return Counted, compared
