"""For mkdocs: a public function that lies in a module of its own name is documented as the function.

``from mlip_kernels.merging.weighted_mean import weighted_mean`` leaves the package with one name for a submodule and a
function. Python takes the function; griffe, which reads sources without importing them, takes the submodule.
"""

from __future__ import annotations

from typing import Any

import griffe


class PublicFunctions(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for name, member in list(pkg.members.items()):
            if not member.is_alias:
                continue
            try:
                target = member.final_target
            except griffe.AliasResolutionError:  # of another package, torch for example
                continue
            if target.is_module and name in target.members:
                pkg.members[name] = griffe.Alias(name, f"{target.path}.{name}", parent=pkg)
