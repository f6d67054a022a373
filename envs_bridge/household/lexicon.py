"""Furniture of rooms and what it can contain: facts of AI2-THOR, which ALFWorld's games are based on.

Names are AI2-THOR's object types. A subset of its tables: enough types for varied games, every entry true there.
"""

# Receptacle types of each kind of room: those that are always there, then optional ones with their maximum.
ROOMS = {
    "kitchen": (
        ("Fridge", "Microwave", "SinkBasin", "CounterTop"),
        {"Cabinet": 8, "Drawer": 6, "DiningTable": 1, "CoffeeMachine": 1, "GarbageCan": 1, "Shelf": 3,
         "StoveBurner": 4, "SideTable": 1, "CounterTop": 2, "Toaster": 1},
    ),
    "livingroom": (
        ("CoffeeTable", "SideTable"),
        {"Sofa": 1, "Drawer": 8, "Shelf": 5, "ArmChair": 2, "Dresser": 1, "DiningTable": 1, "GarbageCan": 1,
         "Desk": 1, "Cabinet": 4, "SideTable": 2, "Ottoman": 1},
    ),
    "bedroom": (
        ("Bed", "Desk"),
        {"Drawer": 8, "Shelf": 6, "Dresser": 1, "SideTable": 2, "GarbageCan": 1, "Safe": 1, "ArmChair": 1,
         "LaundryHamper": 1, "Desk": 1},
    ),
    "bathroom": (
        ("SinkBasin", "Toilet", "CounterTop"),
        {"Cabinet": 6, "Drawer": 5, "BathtubBasin": 1, "GarbageCan": 1, "Shelf": 3, "Cart": 1, "SinkBasin": 1,
         "SideTable": 1},
    ),
}  # fmt: skip

OPENABLE = {"Fridge", "Cabinet", "Microwave", "Drawer", "Safe"}

_TABLE = set(
    "AlarmClock Apple Book Bowl Bread ButterKnife CD Candle CellPhone Cloth CreditCard Cup DishSponge Egg Fork"
    " Glassbottle Kettle KeyChain Knife Ladle Laptop Lettuce Mug Newspaper Pan Pen Pencil PepperShaker Plate Pot"
    " Potato RemoteControl SaltShaker SoapBar SoapBottle Spatula Spoon SprayBottle Statue TissueBox ToiletPaper"
    " Tomato Vase Watch WateringCan WineBottle DeskLamp".split()
)
_SEAT = set("Book CellPhone Cloth CreditCard KeyChain Laptop Newspaper Pillow RemoteControl".split())
_DESK = set(
    "AlarmClock Book Bowl CD Candle CellPhone CreditCard Cup Glassbottle KeyChain Laptop Mug Newspaper Pen Pencil"
    " Plate RemoteControl SprayBottle Statue TissueBox Vase Watch WateringCan WineBottle DeskLamp".split()
)
HOLDS = {
    "CounterTop": _TABLE,
    "DiningTable": _TABLE,
    "CoffeeTable": _TABLE,
    "SideTable": _TABLE,
    "Sofa": _SEAT,
    "ArmChair": _SEAT,
    "Ottoman": _SEAT,
    "Desk": _DESK,
    "Dresser": _DESK,
    "Bed": {"Book", "CellPhone", "Laptop", "Newspaper", "Pillow"},
    "Toilet": set("Candle Cloth DishSponge Newspaper SoapBar SoapBottle SprayBottle TissueBox ToiletPaper".split()),
    "Cart": set("Candle Cloth DishSponge Mug SoapBar SoapBottle SprayBottle Statue TissueBox ToiletPaper Vase".split()),
    "BathtubBasin": {"Cloth", "DishSponge", "SoapBar"},
    "SinkBasin": set(
        "Apple Bowl ButterKnife Cloth Cup DishSponge Egg Fork Glassbottle Kettle Knife Ladle Lettuce Mug Pan Plate Pot"
        " Potato SoapBar Spatula Spoon Tomato".split()
    ),
    "Cabinet": set(
        "Book Bowl CD Candle Cloth Cup DishSponge Glassbottle Kettle Ladle Mug Newspaper Pan PepperShaker Plate Pot"
        " SaltShaker SoapBar SoapBottle SprayBottle TissueBox ToiletPaper Vase WateringCan WineBottle".split()
    ),
    "Shelf": set(
        "AlarmClock Book Bowl CD Candle CellPhone Cloth CreditCard Cup DishSponge Glassbottle Kettle KeyChain Mug"
        " Newspaper Pen Pencil PepperShaker Plate Pot RemoteControl SaltShaker SoapBar SoapBottle SprayBottle Statue"
        " TissueBox ToiletPaper Vase Watch WateringCan WineBottle DeskLamp".split()
    ),
    "Drawer": set(
        "Book ButterKnife CD Candle CellPhone Cloth CreditCard DishSponge Fork KeyChain Knife Ladle Newspaper Pen"
        " Pencil PepperShaker RemoteControl SaltShaker SoapBar SoapBottle Spatula Spoon SprayBottle TissueBox"
        " ToiletPaper Watch WateringCan".split()
    ),
    "GarbageCan": set(
        "Apple Bread CD Cloth DishSponge Egg Lettuce Newspaper Pen Pencil Potato SoapBar SoapBottle SprayBottle"
        " TissueBox ToiletPaper Tomato WineBottle".split()
    ),
    "Safe": {"CD", "CellPhone", "CreditCard", "KeyChain", "Statue", "Vase", "Watch"},
    "Microwave": set("Apple Bowl Bread Cup Egg Glassbottle Mug Plate Potato Tomato".split()),
    "Fridge": set("Apple Bowl Bread Cup Egg Glassbottle Lettuce Mug Pan Plate Pot Potato Tomato WineBottle".split()),
    "StoveBurner": {"Kettle", "Pan", "Pot"},
    "CoffeeMachine": {"Mug"},
    "LaundryHamper": {"Cloth"},
    "Toaster": set(),
}

# Objects found in each kind of room.
OBJECTS = {
    "kitchen": set(
        "Apple Book Bowl Bread ButterKnife Cup DishSponge Egg Fork Glassbottle Kettle Knife Ladle Lettuce Mug Pan"
        " PepperShaker Plate Pot Potato SaltShaker SoapBottle Spatula Spoon Statue Tomato Vase WineBottle".split()
    ),
    "livingroom": set(
        "Book Bowl CellPhone CreditCard DeskLamp KeyChain Laptop Newspaper Pen Pencil Pillow Plate RemoteControl Statue"
        " TissueBox Vase Watch WateringCan".split()
    ),
    "bedroom": set(
        "AlarmClock Book Bowl CD CellPhone Cloth CreditCard DeskLamp KeyChain Laptop Mug Pen Pencil Pillow Statue"
        " TissueBox Vase Watch".split()
    ),
    "bathroom": set("Candle Cloth DishSponge SoapBar SoapBottle SprayBottle TissueBox ToiletPaper".split()),
}

ABILITIES = {
    "cleanable": set(
        "Apple Bowl ButterKnife Cloth Cup DishSponge Egg Fork Kettle Knife Ladle Lettuce Mug Pan Plate Pot Potato"
        " SoapBar Spatula Spoon Tomato".split()
    ),
    "heatable": set("Apple Bread Cup Egg Mug Plate Potato Tomato".split()),
    "coolable": set("Apple Bowl Bread Cup Egg Lettuce Mug Pan Plate Pot Potato Tomato WineBottle".split()),
    "sliceable": set("Apple Bread Egg Lettuce Potato Tomato".split()),
    "isReceptacleObject": set("Bowl Cup Mug Plate Pan Pot".split()),
    "toggleable": {"DeskLamp"},
}
FIXED = {"DeskLamp"}  # cannot be picked up

# Task type: its rooms, the required ability of the object, and ALFWorld's two phrasings.
TASKS = {
    "pick_and_place_simple": (
        ("kitchen", "livingroom", "bedroom", "bathroom"), None,
        ("put a {obj} in {recep}", "put some {obj} on {recep}"),
    ),
    "look_at_obj_in_light": (
        ("livingroom", "bedroom"), None,
        ("look at {obj} under the {toggle}", "examine the {obj} with the {toggle}"),
    ),
    "pick_clean_then_place_in_recep": (
        ("kitchen", "bathroom"), "cleanable",
        ("put a clean {obj} in {recep}", "clean some {obj} and put it in {recep}"),
    ),
    "pick_heat_then_place_in_recep": (
        ("kitchen",), "heatable", ("put a hot {obj} in {recep}", "heat some {obj} and put it in {recep}"),
    ),
    "pick_cool_then_place_in_recep": (
        ("kitchen",), "coolable", ("put a cool {obj} in {recep}", "cool some {obj} and put it in {recep}"),
    ),
    "pick_two_obj_and_place": (
        ("kitchen", "livingroom", "bedroom", "bathroom"), None,
        ("put two {obj} in {recep}", "find two {obj} and put them in {recep}"),
    ),
}  # fmt: skip
STATE_OF_TASK = {
    "pick_clean_then_place_in_recep": "isClean",
    "pick_heat_then_place_in_recep": "isHot",
    "pick_cool_then_place_in_recep": "isCool",
}
