"""All campaigns, by name."""

from __future__ import annotations

from tests.storm import crowds, fuzz, kills, limits, mutations, places, web
from tests.storm.harness import Campaign

CAMPAIGNS: dict[str, Campaign] = {
    campaign.name: campaign
    for family in (kills, mutations, web, limits, crowds, fuzz, places)
    for campaign in family.CAMPAIGNS
}
