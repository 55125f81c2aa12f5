"""The sprite sheets: where they lie, what their checksums are, and how they are fetched."""

from __future__ import annotations

from pathlib import Path

from seqdisent._downloads import find_files

COMMIT = "2668274d5a96c91584172f2d299b90f0a8c0caac"
BASE_URL = f"https://raw.githubusercontent.com/jrconway3/Universal-LPC-spritesheet/{COMMIT}"

SHEETS: dict[str, tuple[str, str]] = {
    "body/dark.png": (
        "body/male/dark.png",
        "57f3b9c510482379aba9a32fc0de7d48e9cbe3dc40f2447283547f773b77ca72",
    ),
    "body/dark2.png": (
        "body/male/dark2.png",
        "91e49453aeab5ebbb4fd2b48253812895dcfb4cb1829b84e24425c66de8f04ff",
    ),
    "body/darkelf.png": (
        "body/male/darkelf.png",
        "7c241033b4897501cb3721b6c3a9ebfa94b13db10a539edbd9bcc3e0c2a4bcb9",
    ),
    "body/darkelf2.png": (
        "body/male/darkelf2.png",
        "055f5aa33fc112d8444b42fce2cf50608a9fbbf2466c54ceaa46c777589a717a",
    ),
    "body/light.png": (
        "body/male/light.png",
        "27d1ac78db37c42f35a20d15c42705efc5e58d47c236cc01423879d4f797f151",
    ),
    "body/tanned.png": (
        "body/male/tanned.png",
        "1e02d0f3fc5b0e1a832477a204e0d7414fe634e0fb743659634a1f0d7f7cb761",
    ),
    "body/tanned2.png": (
        "body/male/tanned2.png",
        "1535e9228357b884df80f777a0d1dac10ac35e550e4d8d077105ccad014a1460",
    ),
    "hair/blue.png": (
        "hair/male/plain/blue2.png",
        "8704caddbe8f2ad1ad5f5dd921863a181e2327dd75682f96b26c046c1d900545",
    ),
    "hair/dark_blonde.png": (
        "hair/male/plain/dark-blonde.png",
        "bd6ddc180fbbc94ec4abde2ccb18a13fe615c272cd902e3c22b14ee63097828f",
    ),
    "hair/green.png": (
        "hair/male/plain/green2.png",
        "dfd7a607f230a8b467fbf8316c2020931cf5b9372576da42969b86d93ac5e941",
    ),
    "hair/pink.png": (
        "hair/male/plain/pink2.png",
        "c7ba6d5d776436575c161e41a5ced001c0796bf1d8933b9a9901b266540da76d",
    ),
    "hair/raven.png": (
        "hair/male/plain/raven2.png",
        "be6a9db24af9c43ab82fbb2ef14e8dc313f967484aed12410621bb40bd3c634a",
    ),
    "hair/white.png": (
        "hair/male/plain/white-blonde2.png",
        "8723962877427849e26a01a79dd2ba952b98207860ccad5e173e8fe77fef59d3",
    ),
    "pants/magenta.png": (
        "legs/pants/male/magenta_pants_male.png",
        "2b2f5b9a75cbc65b1966ea7c34b7102d84fee66437b0d14fae634081ecbc316c",
    ),
    "pants/red.png": (
        "legs/pants/male/red_pants_male.png",
        "3b464feb0d20ff34b0ca2a6d1fd00766ad86e2229c3d56ff91379fe27588a893",
    ),
    "pants/robe_skirt.png": (
        "legs/skirt/male/robe_skirt_male.png",
        "a50af1e08421c4fcc4b6365c75c81c8b328f0d4a7bf93b5a1cb97d45e3b72bde",
    ),
    "pants/teal.png": (
        "legs/pants/male/teal_pants_male.png",
        "4ed7e7702e4f50b9692c0043be04b7296a108d85ea97230fb50d13c150d98771",
    ),
    "pants/white.png": (
        "legs/pants/male/white_pants_male.png",
        "4ec356c488e272fde2d2d0d722b12a80217871e41161d43ba784caf243969ec2",
    ),
    "shirt/longsleeve_brown.png": (
        "torso/shirts/longsleeve/male/brown_longsleeve.png",
        "bb8e098eadf040b6db69c58692231cfbc5bb5d84eb7b5b495e5cf07a6141d330",
    ),
    "shirt/longsleeve_maroon.png": (
        "torso/shirts/longsleeve/male/maroon_longsleeve.png",
        "b917edcf2b3c35d51ef57a6fad67557c5edf048785bea29db09a640d09ac9a90",
    ),
    "shirt/longsleeve_teal.png": (
        "torso/shirts/longsleeve/male/teal_longsleeve.png",
        "e33c6cb31ed1268a2c0dc73b665b1c9b9420e22baf3321880222bdb22682368b",
    ),
    "shirt/longsleeve_white.png": (
        "torso/shirts/longsleeve/male/white_longsleeve.png",
        "2b9b8fefa08894b7ea536cd62b86d494aefe6e54495c5c1d83460827b13b6448",
    ),
}
"""Of each sheet its path in the source repository and its SHA-256."""

ATTRIBUTION = f"""# Attribution for the sprite sheets in this folder and for frames composed from them

Art from the Liberated Pixel Cup (lpc.opengameart.org), as collected in the Universal LPC Spritesheet
(github.com/jrconway3/Universal-LPC-spritesheet, commit {COMMIT}).
Licensed under CC-BY-SA 3.0 (https://creativecommons.org/licenses/by-sa/3.0/) and GPL 3.0
(https://www.gnu.org/licenses/gpl-3.0.html), either of them; composed frames carry the same terms.
Full credits are in AUTHORS.txt of that repository. Read from it, the layers used here are by:
- male base body, walk, slash and spellcast: Stephen Challener (Redshrike)
- tanned and dark skin: Marcel van de Steeg; dark2: Mark Weyer; darkelf, darkelf2: Nila122
- plain hair (male) and recolouring: Joe White; further recolours: Nila122, JaidynReiman
- long-sleeve shirts, trousers, robe skirt: Johannes Sjoelund; magenta and maroon trousers: JRConway3
"""


def find_sheets(root: str | Path | None, *, download: bool, base_url: str, timeout: float) -> Path:
    """The folder that holds all the sheets, each checked."""
    return find_files(
        root,
        "lpc/layers",
        SHEETS,
        what=f"the {len(SHEETS)} sprite sheets",
        remedy="Point root or SEQDISENT_DATA at them, or call sprites(download=True) to fetch them (2 MB)",
        download=download,
        base_url=base_url,
        timeout=timeout,
        attribution=ATTRIBUTION,
    )
