"""What a study says of a made-up table."""


def judged(study, table, *, more=False):
    """{id: claim}, of just the claims that are expected of it; with `more` of others too."""
    claims = {claim.id: claim for claim in study.claims(table)}
    expected = study.EXPECTED.keys()
    assert claims.keys() >= expected if more else claims.keys() == expected
    return claims


def lost(found):
    """The ids of the claims that do not hold."""
    return {id for id, claim in found.items() if not claim.holds}
