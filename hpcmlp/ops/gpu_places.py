"""Which GPU each rank takes, from the GPUs that every rank sees: one of its own for as many ranks as can have one."""

ONE_EACH = ("one rank per GPU: --ntasks-per-node equal to the GPUs, each seeing all (--gpus-per-node) or its own "
            "(--gpus-per-task=1)")


def take_places(seen: list[list[str]]) -> list[int | None]:
    """Return which of the GPUs that it sees each rank takes, as a place in its own list; None for a rank without any.

    Local: all ranks that hold the same lists find the same. As many ranks as possible get a GPU to themselves, whatever
    each of them sees (a greatest matching, by augmenting paths); the others share, in further rounds of the same.
    Where all see the same, rank k of them takes place k.

    seen : for each rank the identities, no two GPUs of any node with the same, in the order of its own numbers.
    """
    places: list[int | None] = [None] * len(seen)
    left = [rank for rank, identities in enumerate(seen) if identities]
    while left:     # in each round a GPU gets one rank more
        holder: dict[str, int] = {}
        for rank in left:
            _place(rank, seen, holder, set())
        for identity, rank in holder.items():
            places[rank] = seen[rank].index(identity)
        left = [rank for rank in left if places[rank] is None]
    return places


def _place(rank: int, seen: list[list[str]], holder: dict[str, int], asked: set[str]) -> bool:
    """Find the rank a GPU that is free, or whose holder finds another one."""
    free = next((identity for identity in seen[rank] if identity not in holder), None)
    if free is not None:
        holder[free] = rank
        return True
    for identity in seen[rank]:
        if identity not in asked:
            asked.add(identity)
            if _place(holder[identity], seen, holder, asked):
                holder[identity] = rank
                return True
    return False


def sharing(seen: list[list[str]]) -> list[list[int]]:
    """Return the groups of ranks that share a GPU when all take what `take_places` says. Local."""
    users: dict[str, list[int]] = {}
    for rank, place in enumerate(take_places(seen)):
        if place is not None:
            users.setdefault(seen[rank][place], []).append(rank)
    return [ranks for ranks in users.values() if len(ranks) > 1]
