"""The contract suite that every energy must pass; plug-ins run it on their own energies with three lines::

    @pytest.mark.parametrize(("energy", "contract"), groundstate.testing.cases(MyEnergy), ids=str)
    def test_contract(energy, contract):
        contract(energy)

or ``groundstate.testing.check(MyEnergy())`` without pytest. Contracts state identities (closed form = autograd, prox
optimality, duality, declared invariances) and are chosen by capability, so nothing is skipped inside one.
"""

from __future__ import annotations

from groundstate.testing.contracts import CONTRACTS, Contract, cases, check, contracts_for

__all__ = ["CONTRACTS", "Contract", "cases", "check", "contracts_for"]
