"""What the passes that learn share."""

from diffpress.compress.training import in_turn


def test_every_item_comes_once_before_one_comes_again() -> None:
    orders = [[in_turn(7 * epoch + place, 7, 3) for place in range(7)] for epoch in range(4)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert orders[0] == [in_turn(place, 7, 3) for place in range(7)] != [in_turn(place, 7, 4) for place in range(7)]
