"""The words on a `realistic` page: room names in four languages, room sizes, agents and small print.

They are ASCII: Pillow's built-in font has no accents.
"""

from __future__ import annotations

from dino_lightning.floor_plans.geometry import Polygon, bounds, signed_area

NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "english": {
        "living": ("Living Room", "Lounge", "Sitting Room", "Reception Room"),
        "open": (
            "Kitchen / Living Room",
            "Open Plan Living",
            "Kitchen / Reception",
            "Living / Dining / Kitchen",
        ),
        "kitchen": ("Kitchen", "Kitchen", "Kitchen / Breakfast"),
        "bedroom": ("Bedroom",),
        "bath": ("Bathroom", "Bathroom", "Bath"),
        "ensuite": ("En-suite", "Shower Room"),
        "wc": ("WC", "Cloaks"),
        "hall": ("Hall", "Entrance Hall", "Hallway"),
        "landing": ("Landing",),
        "dining": ("Dining Room",),
        "family": ("Family Room", "Playroom", "Snug"),
        "study": ("Study", "Office"),
        "utility": ("Utility",),
        "store": ("Store", "Cpd"),
        "dressing": ("Dressing", "Wardrobe"),
        "garage": ("Garage",),
    },
    "german": {
        "living": ("Wohnen", "Wohnzimmer"),
        "open": ("Wohnen / Kochen", "Wohnen / Essen"),
        "kitchen": ("Kochen", "Kochen / Essen"),
        "bedroom": ("Zimmer",),
        "bath": ("Bad",),
        "ensuite": ("Duschbad",),
        "wc": ("WC",),
        "hall": ("Flur", "Diele"),
        "landing": ("Flur",),
        "dining": ("Essen", "Esszimmer"),
        "family": ("Spielzimmer",),
        "study": ("Arbeiten", "Arbeitszimmer"),
        "utility": ("HWR",),
        "store": ("Abst.",),
        "dressing": ("Ankleide",),
        "garage": ("Garage",),
    },
    "french": {
        "living": ("Salon", "Sejour"),
        "open": ("Sejour / Cuisine", "Salon / Cuisine"),
        "kitchen": ("Cuisine",),
        "bedroom": ("Chambre",),
        "bath": ("Salle de bain", "SdB"),
        "ensuite": ("SdE",),
        "wc": ("WC",),
        "hall": ("Couloir", "Hall"),
        "landing": ("Palier",),
        "dining": ("Repas",),
        "family": ("Salle de jeux",),
        "study": ("Bureau",),
        "utility": ("Buanderie",),
        "store": ("Rgt",),
        "dressing": ("Dressing",),
        "garage": ("Garage",),
    },
    "spanish": {
        "living": ("Sala de estar", "Estar"),
        "open": ("Estar / Cocina",),
        "kitchen": ("Cocina",),
        "bedroom": ("Dormitorio",),
        "bath": ("Aseo", "Aseo completo"),
        "ensuite": ("Ducha",),
        "wc": ("Aseo",),
        "hall": ("Recibidor", "Pasillo"),
        "landing": ("Distribuidor",),
        "dining": ("Comedor",),
        "family": ("Sala",),
        "study": ("Despacho",),
        "utility": ("Lavadero",),
        "store": ("Trastero",),
        "dressing": ("Vestidor",),
        "garage": ("Garaje",),
    },
}
OUTDOOR_NAMES: dict[str, tuple[str, ...]] = {
    "english": ("Terrace", "Balcony", "Patio", "Decking"),
    "german": ("Terrasse", "Balkon"),
    "french": ("Terrasse", "Balcon"),
    "spanish": ("Terraza", "Porche"),
}
UNITS = ("two lines", "two lines", "one line", "m x m", "sq m", "")
AGENTS = (
    "Harrow & Finch",
    "Oakfield Residential",
    "MARLOWE ESTATES",
    "14 Linden Crescent",
    "Flat 3, 27 Albion Street",
    "Rose Cottage, Mill Lane",
)
DISCLAIMER = (
    "This plan is for illustrative purposes only and is not to scale. Whilst every attempt has been made to "
    "ensure its accuracy, measurements of doors, windows, rooms and any other items are approximate and no "
    "responsibility is taken for any error, omission or misstatement."
)


def feet(metres: float) -> str:
    """Feet and inches as agents write them, e.g. 13'0"."""
    inches = round(metres / 0.0254)
    return f"{inches // 12}'{inches % 12}\""


def measured(outline: Polygon, units: str) -> list[str]:
    """The lines that state the size of a room, from its outline in metres."""
    x0, y0, x1, y1 = bounds(outline)
    width, height = x1 - x0, y1 - y0
    metric, imperial = f"{width:.2f}m x {height:.2f}m", f"{feet(width)} x {feet(height)}"
    if units == "two lines":
        return [metric, imperial]
    if units == "one line":
        return [f"{metric} / {imperial}"]
    if units == "m x m":
        return [f"{width:.2f} x {height:.2f} m"]
    return [f"{abs(signed_area(outline)):.1f} {units}"] if units else []
