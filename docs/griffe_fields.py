"""Two things that Griffe's static reading misses: jaxtyping's shape strings as they are written, and the signatures of Equinox modules."""

import ast

import griffe


class ShapesAndFields(griffe.Extension):
    """Keeps annotations as source text, and gives every class without `__init__` one from its annotated fields and those of its bases."""

    def on_function_instance(self, *, node, func, **kwargs) -> None:
        """`Float[Array, "n *x"]`, not a product of n and x."""
        if isinstance(node, ast.FunctionDef):
            for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
                if argument.annotation is not None:
                    func.parameters[argument.arg].annotation = ast.unparse(argument.annotation)
            if node.returns is not None:
                func.returns = ast.unparse(node.returns)

    def on_attribute_instance(self, *, node, attr, **kwargs) -> None:
        """The same for fields."""
        if isinstance(node, ast.AnnAssign):
            attr.annotation = ast.unparse(node.annotation)

    def on_package(self, *, pkg, **kwargs) -> None:
        """Runs once the whole package is read."""
        for module in _modules(pkg):
            for cls in module.classes.values():
                if cls.is_alias or "__init__" in cls.members or "dataclass" in cls.labels:
                    continue
                fields = {}
                for base in [*reversed(cls.mro()), cls]:
                    fields |= {name: field for name, field in base.attributes.items() if _is_field(field)}
                parameters = [_parameter(name, field) for name, field in fields.items()]
                cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(griffe.Parameter("self"), *parameters)))


def _modules(module):
    yield module
    for inner in module.modules.values():
        if not inner.is_alias:
            yield from _modules(inner)


def _is_field(attribute):
    annotated = attribute.annotation is not None and not str(attribute.annotation).startswith("ClassVar")
    return annotated and "property" not in attribute.labels


def _parameter(name, field):
    default = str(field.value) if field.value is not None else None
    if default and default.startswith("eqx.field("):
        default = default.partition("default=")[2].removesuffix(")") or None
    return griffe.Parameter(name, annotation=field.annotation, kind=griffe.ParameterKind.positional_or_keyword, default=default)
