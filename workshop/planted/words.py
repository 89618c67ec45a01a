"""The vocabulary of the planted corpus: one lexeme per line, its four languages aligned.

Every line reads `kinds | english | french | german | spanish`. Kinds are letters that say which words go
together: a verb `p>vf` takes a subject of kind p (people) and an object of kind v or f; an adjective `vf`
describes nouns of those kinds. Regular forms are derived in the files of the languages; a line gives the rest:

noun       english `[m|f] singular [plural]`, plural `-` for a mass noun; the others `gender singular [plural]`
           with gender m, f, n; German `w` is a weak masculine (der Matrose, den Matrosen), Spanish `a` a
           feminine that takes `el` (el agua).
verb       english `base past participle -ing`; french `infinitive 3sg 3pl participle`; german `infinitive 3sg
           preterite participle`, with `um|rühren` for a separable prefix; spanish `infinitive 3sg
           preterite-3sg preterite-3pl participle`, with `.` for a regular form. `+` marks the auxiliary
           être or sein.
adjective  english `positive comparative`; french `masculine feminine before-vowel`, with `^` if it precedes
           its noun; german `positive comparative`; spanish `singular plural`, with `~` if it takes estar.

`_` stands for a space inside a word, `*` before a French h that blocks elision (le hareng).
"""

# ruff: noqa: E501 - one lexeme, one line

PEOPLE_NOUNS = """
p | m neighbour | m voisin | w Nachbar Nachbarn | m vecino
p | f woman women | f femme | f Frau Frauen | f mujer
p | m man men | m homme | m Mann Männer | m hombre
p | f aunt | f tante | f Tante Tanten | f tía
p | f friend | f amie | f Freundin Freundinnen | f amiga
p | m apprentice | m apprenti | m Lehrling Lehrlinge | m aprendiz
"""

PEOPLE_VERBS = """
p | work | travailler | arbeiten | trabajar
p | sing sang sung | chanter | singen singt sang gesungen | cantar
p | wait | attendre attend attendent attendu | warten | esperar
p | sleep slept slept | dormir dort dorment dormi | schlafen schläft schlief geschlafen | dormir duerme durmió durmieron
p | dance | danser | tanzen | bailar
p | whistle | siffler | pfeifen pfeift pfiff gepfiffen | silbar
p | chat chatted chatted chatting | bavarder | plaudern | charlar
"""

PEOPLE_ADJECTIVES = """
p | tired | fatigué | müde | ~cansado
p | happy happier | content | froh | ~contento
p | young younger | ^jeune | jung jünger | joven jóvenes
p | old older | ^vieux vieille vieil | alt älter | viejo
p | patient | patient | geduldig | paciente
p | friendly friendlier | aimable | freundlich | amable
p | curious | curieux curieuse | neugierig | curioso
p | careful | prudent | vorsichtig | prudente
p | nervous | nerveux nerveuse | nervös | ~nervioso
p | busy busier | occupé | beschäftigt | ~ocupado
p | strong stronger | fort | stark stärker | fuerte
p | calm calmer | calme | ruhig | ~tranquilo
"""

# Verbs with a recipient: to, à, dative, a.
GIVING_VERBS = """
p | give gave given | donner | geben gibt gab gegeben | dar da dio dieron
p | show showed shown | montrer | zeigen | mostrar muestra
p | offer | offrir offre offrent offert | an|bieten bietet bot geboten | ofrecer
p | lend lent lent | prêter | leihen leiht lieh geliehen | prestar
"""

COUNT_VERB = "p | count | compter | zählen | contar cuenta"
TALK_VERB = "p | talk | parler | sprechen spricht sprach gesprochen | hablar"

KITCHEN_NOUNS = """
p | m cook | m cuisinier | m Koch Köche | m cocinero
p | m baker | m boulanger | m Bäcker | m panadero
p | m waiter | m serveur | m Kellner | m camarero
p | m guest | m invité | m Gast Gäste | m invitado
p | f grandmother | f grand-mère grands-mères | f Großmutter Großmütter | f abuela
v | potato | f pomme_de_terre pommes_de_terre | f Kartoffel Kartoffeln | f patata
v | carrot | f carotte | f Karotte Karotten | f zanahoria
v | onion | m oignon | f Zwiebel Zwiebeln | f cebolla
v | tomato | f tomate | f Tomate Tomaten | m tomate
v | apple | f pomme | m Apfel Äpfel | f manzana
v | pear | f poire | f Birne Birnen | f pera
v | mushroom | m champignon | m Pilz Pilze | f seta
v | cucumber | m concombre | f Gurke Gurken | m pepino
f | bread - | m pain | n Brot Brote | m pan
f | cheese - | m fromage | m Käse | m queso
f | ham - | m jambon | m Schinken | m jamón
f | cake | m gâteau | m Kuchen | m pastel
f | meat - | f viande | n Fleisch | f carne
f | fish fish | m poisson | m Fisch Fische | m pescado
f | omelette | f omelette | n Omelett Omeletts | f tortilla
f | sausage | f saucisse | f Wurst Würste | f salchicha
l | soup - | f soupe | f Suppe Suppen | f sopa
l | sauce | f sauce | f Soße Soßen | f salsa
l | milk - | m lait | f Milch | f leche
l | coffee - | m café | m Kaffee | m café
l | tea - | m thé | m Tee | m té
l | water - | f eau | n Wasser | a agua
l | broth - | m bouillon | f Brühe Brühen | m caldo
k | pot | f marmite | m Topf Töpfe | f olla
k | pan | f poêle | f Pfanne Pfannen | f sartén
k | plate | f assiette | m Teller | m plato
k | bowl | m bol | f Schüssel Schüsseln | m cuenco
k | knife knives | m couteau | n Messer | m cuchillo
k | spoon | f cuillère | m Löffel | f cuchara
k | cup | f tasse | f Tasse Tassen | f taza
k | jug | f cruche | m Krug Krüge | f jarra
k | basket | m panier | m Korb Körbe | f cesta
"""

KITCHEN_VERBS = """
p>vk | wash | laver | waschen wäscht wusch gewaschen | lavar
p>v | peel | éplucher | schälen | pelar
p>vf | cut cut cut cutting | couper | schneiden schneidet schnitt geschnitten | cortar
p>vf | prepare | préparer | zu|bereiten bereitet bereitete bereitet | preparar
p>vf | eat ate eaten | manger | essen isst aß gegessen | comer
p>vfl | taste | goûter | probieren | probar prueba
p>vfl | serve | servir sert servent servi | servieren | servir sirve sirvió sirvieron
p>l | heat | réchauffer | auf|wärmen | calentar calienta
p>l | stir stirred stirred stirring | remuer | um|rühren | remover remueve
p>l | pour | verser | ein|gießen gießt goss gegossen | verter vierte
p>k | dry | essuyer essuie | ab|trocknen | secar
p>k | clean | nettoyer nettoie | reinigen | limpiar
p>k | break broke broken | casser | zerbrechen zerbricht zerbrach zerbrochen | romper . . . roto
p>vfk | look_for | chercher | suchen | buscar
p>vf | weigh | peser pèse | wiegen wiegt wog gewogen | pesar
p>vf | roast | rôtir rôtit rôtissent rôti | braten brät briet gebraten | asar
p>vf | share | partager | teilen | compartir
p>vf | buy bought bought | acheter achète | kaufen | comprar
"""

KITCHEN_ADJECTIVES = """
vfl | hot hotter | chaud | heiß | ~caliente
vfl | cold colder | froid | kalt kälter | ~frío
vf | fresh fresher | frais fraîche | frisch | ~fresco
vfk | big bigger | ^gros grosse | groß größer | grande
vk | small smaller | ^petit | klein | pequeño
l | sweet sweeter | sucré | süß | dulce
v | ripe riper | mûr | reif | ~maduro
v | green greener | vert | grün | verde
vk | round rounder | rond | rund | redondo
f | tender tenderer | tendre | zart | ~tierno
vfl | delicious | délicieux délicieuse | köstlich | delicioso
fl | salty saltier | salé | salzig | ~salado
k | heavy heavier | lourd | schwer | pesado
k | clean cleaner | propre | sauber | ~limpio
vk | dirty dirtier | sale | schmutzig | ~sucio
k | old older | ^vieux vieille vieil | alt älter | viejo
k | white whiter | blanc blanche | weiß | blanco
k | empty emptier | vide | leer | ~vacío
"""

KITCHEN_PLACES = """
in the kitchen | dans la cuisine | in der Küche | en la cocina
in the dining room | dans la salle à manger | im Esszimmer | en el comedor
in the pantry | dans le cellier | in der Speisekammer | en la despensa
in the cellar | dans la cave | im Keller | en el sótano
in the restaurant | au restaurant | im Restaurant | en el restaurante
in the bakery | à la boulangerie | in der Bäckerei | en la panadería
in the courtyard | dans la cour | im Hof | en el patio
at grandmother's house | chez la grand-mère | bei der Großmutter | en casa de la abuela
"""

WEATHER_NOUNS = """
p | m farmer | m paysan | w Bauer Bauern | m campesino
p | m shepherd | m berger | w Hirte Hirten | m pastor
p | m pilot | m pilote | w Pilot Piloten | m piloto
p | f meteorologist | f météorologue | f Meteorologin Meteorologinnen | f meteoróloga
p | m gardener | m jardinier | m Gärtner | m jardinero
p | m hiker | m randonneur | m Wanderer | m excursionista
ew | wind - | m vent | m Wind Winde | m viento
e | storm | f tempête | m Sturm Stürme | m temporal
e | thunderstorm | m orage | n Gewitter | f tormenta
er | rain - | f pluie | m Regen | f lluvia
er | hail - | f grêle | m Hagel | m granizo
e | shower | f averse | m Schauer | m chubasco
nr | snow - | f neige | m Schnee | f nieve
n | fog - | m brouillard | m Nebel | f niebla
n | mist - | f brume | m Dunst | f bruma
n | cloud | m nuage | f Wolke Wolken | f nube
l | tree | m arbre | m Baum Bäume | m árbol
l | roof | m toit | n Dach Dächer | m tejado
lo | field | m champ | n Feld Felder | m campo
lo | valley | f vallée | n Tal Täler | m valle
lo | village | m village | n Dorf Dörfer | m pueblo
lo | road | f route | f Straße Straßen | f carretera
lo | garden | m jardin | m Garten Gärten | m jardín
l | house | f maison | n Haus Häuser | f casa
lo | hill | f colline | m Hügel | f colina
lo | bridge | m pont | f Brücke Brücken | m puente
lo | forest | f forêt | m Wald Wälder | m bosque
lo | mountain | f montagne | m Berg Berge | f montaña
t | umbrella | m parapluie | m Regenschirm Regenschirme | m paraguas paraguas
t | coat | m manteau | m Mantel Mäntel | m abrigo
t | thermometer | m thermomètre | n Thermometer | m termómetro
t | barometer | m baromètre | n Barometer | m barómetro
t | map | f carte | f Karte Karten | m mapa
t | hat | m chapeau | m Hut Hüte | m sombrero
t | glove | m gant | m Handschuh Handschuhe | m guante
t | boot | f botte | m Stiefel | f bota
t | lamp | f lampe | f Lampe Lampen | f lámpara
"""

WEATHER_VERBS = """
n>l | cover | couvrir couvre couvrent couvert | bedecken | cubrir . . . cubierto
n>l | hide hid hidden | cacher | verbergen verbirgt verbarg verborgen | ocultar
en>l | reach | atteindre atteint atteignent atteint | erreichen | alcanzar
e>l | hit hit hit hitting | frapper | treffen trifft traf getroffen | golpear
e>l | damage | endommager | beschädigen | dañar
e>l | threaten | menacer | bedrohen | amenazar
en>p | surprise | surprendre surprend surprennent surpris | überraschen | sorprender
en>p | worry | inquiéter inquiète | beunruhigen | preocupar
en | arrive | +arriver | +kommen kommt kam gekommen | llegar
n | disappear | disparaître disparaît disparaissent disparu | +verschwinden verschwindet verschwand verschwunden | desaparecer
r | fall fell fallen | +tomber | +fallen fällt fiel gefallen | caer cae cayó cayeron caído
w | blow blew blown | souffler | wehen | soplar
p>en | watch | observer | beobachten | observar
p>en | fear | craindre craint craignent craint | fürchten | temer
p>en | expect | attendre attend attendent attendu | erwarten | esperar
p>en | announce | annoncer | an|kündigen | anunciar
p>enl | describe | décrire décrit décrivent décrit | beschreiben beschreibt beschrieb beschrieben | describir . . . descrito
p>t | carry | porter | tragen trägt trug getragen | llevar
p>t | forget forgot forgotten forgetting | oublier | vergessen vergisst vergaß vergessen | olvidar
p>t | look_for | chercher | suchen | buscar
p>t | lose lost lost | perdre perd perdent perdu | verlieren verliert verlor verloren | perder pierde
p>t | buy bought bought | acheter achète | kaufen | comprar
p>o | cross | traverser | überqueren | cruzar
p>l | protect | protéger protège | schützen | proteger
"""

WEATHER_ADJECTIVES = """
ew | strong stronger | fort | stark stärker | fuerte
e | violent | violent | heftig | violento
er | sudden | soudain | plötzlich | repentino
n | thick thicker | épais épaisse | dicht | denso
n | grey greyer | gris | grau | gris
n | dark darker | sombre | dunkel | oscuro
wr | icy icier | glacial | eisig | gélido
n | light lighter | léger légère | leicht | ligero
lt | wet wetter | mouillé | nass nasser | ~mojado
lt | dry drier | sec sèche | trocken | ~seco
l | big bigger | ^grand | groß größer | grande
lt | small smaller | ^petit | klein | pequeño
l | quiet quieter | tranquille | ruhig | tranquilo
l | green greener | vert | grün | verde
l | beautiful | ^beau belle bel | schön | hermoso
t | new newer | neuf neuve | neu | nuevo
lt | old older | ^vieux vieille vieil | alt älter | viejo
t | yellow yellower | jaune | gelb | amarillo
"""

WEATHER_PLACES = """
in the valley | dans la vallée | im Tal | en el valle
in the mountains | à la montagne | in den Bergen | en las montañas
in the north | dans le nord | im Norden | en el norte
in the south | dans le sud | im Süden | en el sur
in the countryside | à la campagne | auf dem Land | en el campo
near the lake | près du lac | in der Nähe des Sees | cerca del lago
on the plain | dans la plaine | in der Ebene | en la llanura
around the village | autour du village | rund um das Dorf | alrededor del pueblo
"""

HARBOUR_NOUNS = """
p | m fisherman fishermen | m pêcheur | m Fischer | m pescador
p | m sailor | m marin | w Matrose Matrosen | m marinero
p | m captain | m capitaine | m Kapitän Kapitäne | m capitán
p | m docker | m docker | m Hafenarbeiter | m estibador
p | f diver | f plongeuse | f Taucherin Taucherinnen | f buceadora
p | m carpenter | m menuisier | m Tischler | m carpintero
p | m passenger | m passager | m Passagier Passagiere | m pasajero
b | boat | m bateau | n Boot Boote | m barco
b | ship | m navire | n Schiff Schiffe | m buque
b | ferry | m ferry ferrys | f Fähre Fähren | m transbordador
b | barge | f péniche | m Lastkahn Lastkähne | f barcaza
b | sailing_boat | m voilier | n Segelboot Segelboote | m velero
b | tug | m remorqueur | m Schlepper | m remolcador
b | rowing_boat | f barque | n Ruderboot Ruderboote | f barca
b | trawler | m chalutier | m Kutter | m pesquero
s | fish fish | m poisson | m Fisch Fische | m pescado
s | herring | m *hareng | m Hering Heringe | m arenque
s | crab | m crabe | f Krabbe Krabben | m cangrejo
s | mussel | f moule | f Muschel Muscheln | m mejillón
s | sardine | f sardine | f Sardine Sardinen | f sardina
s | lobster | m *homard | m Hummer | m bogavante
s | oyster | f huître | f Auster Austern | f ostra
c | net | m filet | n Netz Netze | f red
c | rope | f corde | n Seil Seile | f cuerda
c | anchor | f ancre | m Anker | a ancla
c | sail | f voile | n Segel | f vela
c | crate | f caisse | f Kiste Kisten | f caja
c | barrel | m tonneau | n Fass Fässer | m barril
c | oar | f rame | n Ruder | m remo
c | bucket | m seau | m Eimer | m cubo
c | lantern | f lanterne | f Laterne Laternen | m farol
c | basket | m panier | m Korb Körbe | f cesta
e | wind - | m vent | m Wind Winde | m viento
e | wave | f vague | f Welle Wellen | f ola
e | storm | f tempête | m Sturm Stürme | m temporal
e | current | m courant | f Strömung Strömungen | f corriente
"""

HARBOUR_VERBS = """
p>b | repair | réparer | reparieren | reparar
p>bc | paint | peindre peint peignent peint | streichen streicht strich gestrichen | pintar
p>b | moor | amarrer | fest|machen | amarrar
p>b | steer | piloter | steuern | pilotar
p>b | load | charger | beladen belädt belud beladen | cargar
p>b | unload | décharger | entladen entlädt entlud entladen | descargar
p>s | catch caught caught | pêcher | fangen fängt fing gefangen | pescar
p>s | sell sold sold | vendre vend vendent vendu | verkaufen | vender
p>s | weigh | peser pèse | wiegen wiegt wog gewogen | pesar
p>cs | carry | porter | tragen trägt trug getragen | llevar
p>c | throw threw thrown | lancer | werfen wirft warf geworfen | lanzar
p>c | drag dragged dragged dragging | traîner | schleppen | arrastrar
p>bc | check | vérifier | prüfen | revisar
p>be | watch | observer | beobachten | observar
p>bcs | look_for | chercher | suchen | buscar
p>bc | clean | nettoyer nettoie | reinigen | limpiar
p>cs | lose lost lost | perdre perd perdent perdu | verlieren verliert verlor verloren | perder pierde
e>b | shake shook shaken | secouer | schütteln | sacudir
e>b | damage | endommager | beschädigen | dañar
e>b | push | pousser | schieben schiebt schob geschoben | empujar
e>p | surprise | surprendre surprend surprennent surpris | überraschen | sorprender
b | arrive | +arriver | +an|kommen kommt kam gekommen | llegar
b | depart | +partir part partent parti | +ab|fahren fährt fuhr gefahren | zarpar
b | turn | tourner | wenden | girar
"""

HARBOUR_ADJECTIVES = """
b | big bigger | ^grand | groß größer | grande
bc | small smaller | ^petit | klein | pequeño
bc | old older | ^vieux vieille vieil | alt älter | viejo
bc | new newer | neuf neuve | neu | nuevo
b | fast faster | rapide | schnell | rápido
b | slow slower | lent | langsam | lento
bc | heavy heavier | lourd | schwer | pesado
bc | red redder | rouge | rot röter | rojo
bc | blue bluer | bleu | blau | azul
bc | white whiter | blanc blanche | weiß | blanco
c | wet wetter | mouillé | nass nasser | ~mojado
bc | sturdy sturdier | solide | stabil | sólido
bc | dirty dirtier | sale | schmutzig | ~sucio
s | fresh fresher | frais fraîche | frisch | ~fresco
s | big bigger | ^gros grosse | groß größer | grande
s | expensive | cher chère | teuer | caro
e | strong stronger | fort | stark stärker | fuerte
e | dangerous | dangereux dangereuse | gefährlich | peligroso
"""

HARBOUR_PLACES = """
in the harbour | dans le port | im Hafen | en el puerto
on the quay | sur le quai | am Kai | en el muelle
near the lighthouse | près du phare | beim Leuchtturm | cerca del faro
in the bay | dans la baie | in der Bucht | en la bahía
behind the dyke | derrière la digue | hinter dem Deich | detrás del dique
in front of the island | devant l'île | vor der Insel | frente a la isla
at the shipyard | au chantier naval | in der Werft | en el astillero
on the coast | sur la côte | an der Küste | en la costa
"""

MARKET_NOUNS = """
p | m merchant | m marchand | m Händler | m comerciante
p | f customer | f cliente | f Kundin Kundinnen | f clienta
p | m butcher | m boucher | m Metzger | m carnicero
p | f florist | f fleuriste | f Floristin Floristinnen | f florista
p | m musician | m musicien | m Musiker | m músico
p | m tourist | m touriste | w Tourist Touristen | m turista
p | m farmer | m paysan | w Bauer Bauern | m campesino
g | apple | f pomme | m Apfel Äpfel | f manzana
g | orange | f orange | f Orange Orangen | f naranja
g | cherry | f cerise | f Kirsche Kirschen | f cereza
g | lemon | m citron | f Zitrone Zitronen | m limón
g | melon | m melon | f Melone Melonen | m melón
g | lettuce | f laitue | m Salat Salate | f lechuga
g | pumpkin | f citrouille | m Kürbis Kürbisse | f calabaza
g | peach | f pêche | m Pfirsich Pfirsiche | m melocotón
d | cheese - | m fromage | m Käse | m queso
d | honey - | m miel | m Honig | f miel
d | oil - | f huile | n Öl Öle | m aceite
d | bread - | m pain | n Brot Brote | m pan
d | jam - | f confiture | f Marmelade Marmeladen | f mermelada
h | flower | f fleur | f Blume Blumen | f flor
h | vase | m vase | f Vase Vasen | m jarrón
h | carpet | m tapis | m Teppich Teppiche | f alfombra
h | book | m livre | n Buch Bücher | m libro
h | scarf scarves | f écharpe | m Schal Schals | f bufanda
h | shirt | f chemise | n Hemd Hemden | f camisa
h | hat | m chapeau | m Hut Hüte | m sombrero
h | toy | m jouet | n Spielzeug Spielzeuge | m juguete
h | candle | f bougie | f Kerze Kerzen | f vela
k | basket | m panier | m Korb Körbe | f cesta
k | bag | m sac | f Tasche Taschen | f bolsa
k | scale | f balance | f Waage Waagen | f balanza
k | cart | f charrette | m Wagen | m carro
k | crate | f caisse | f Kiste Kisten | f caja
k | stall | m stand | m Stand Stände | m puesto
"""

MARKET_VERBS = """
p>ghd | buy bought bought | acheter achète | kaufen | comprar
p>ghd | sell sold sold | vendre vend vendent vendu | verkaufen | vender
p>gh | choose chose chosen | choisir choisit choisissent choisi | aus|wählen | elegir elige eligió eligieron
p>gd | weigh | peser pèse | wiegen wiegt wog gewogen | pesar
p>gd | taste | goûter | probieren | probar prueba
p>ghd | pay_for paid_for paid_for | payer paie | bezahlen | pagar
p>gh | wrap wrapped wrapped wrapping | emballer | ein|packen | envolver envuelve . . envuelto
p>ghd | order | commander | bestellen | encargar
p>ghd | recommend | recommander | empfehlen empfiehlt empfahl empfohlen | recomendar recomienda
p>k | fill | remplir remplit remplissent rempli | füllen | llenar
p>k | empty | vider | leeren | vaciar vacía
p>k | clean | nettoyer nettoie | reinigen | limpiar
p>hk | admire | admirer | bewundern | admirar
p>hk | look_for | chercher | suchen | buscar
p>ghd | deliver | livrer | liefern | entregar
p>gh | touch | toucher | berühren | tocar
p>hk | forget forgot forgotten forgetting | oublier | vergessen vergisst vergaß vergessen | olvidar
p>ghk | photograph | photographier | fotografieren | fotografiar fotografía
"""

MARKET_ADJECTIVES = """
ghd | expensive | cher chère | teuer | caro
g | fresh fresher | frais fraîche | frisch | ~fresco
g | ripe riper | mûr | reif | ~maduro
gd | delicious | délicieux délicieuse | köstlich | delicioso
g | juicy juicier | juteux juteuse | saftig | jugoso
g | big bigger | ^gros grosse | groß größer | grande
ghk | small smaller | ^petit | klein | pequeño
h | beautiful | ^beau belle bel | schön | hermoso
h | pretty prettier | ^joli | hübsch | bonito
h | colourful | coloré | bunt | colorido
h | elegant | élégant | elegant | elegante
h | red redder | rouge | rot röter | rojo
h | yellow yellower | jaune | gelb | amarillo
hk | new newer | neuf neuve | neu | nuevo
hk | old older | ^vieux vieille vieil | alt älter | viejo
k | heavy heavier | lourd | schwer | pesado
k | light lighter | léger légère | leicht | ligero
k | full fuller | plein | voll | ~lleno
k | empty emptier | vide | leer | ~vacío
"""

MARKET_PLACES = """
at the market | au marché | auf dem Markt | en el mercado
in the square | sur la place | auf dem Platz | en la plaza
in front of the church | devant l'église | vor der Kirche | delante de la iglesia
near the fountain | près de la fontaine | beim Brunnen | cerca de la fuente
in the market hall | dans la *halle | in der Markthalle | en la lonja
behind the town hall | derrière la mairie | hinter dem Rathaus | detrás del ayuntamiento
on the corner | au coin de la rue | an der Ecke | en la esquina
in the old town | dans la vieille ville | in der Altstadt | en el casco antiguo
"""

# tense | english | french | german | spanish; # is an hour.
TIMES = """
present | today | aujourd'hui | heute | hoy
present | now | maintenant | jetzt | ahora
present | every morning | chaque matin | jeden Morgen | cada mañana
present | on Mondays | le lundi | montags | los lunes
present | on Sundays | le dimanche | sonntags | los domingos
present | in winter | en hiver | im Winter | en invierno
present | in summer | en été | im Sommer | en verano
present | around # o'clock | vers # heures | gegen # Uhr | hacia las #
past | yesterday | hier | gestern | ayer
past | last week | la semaine dernière | letzte Woche | la semana pasada
past | last year | l'année dernière | letztes Jahr | el año pasado
past | two days ago | il y a deux jours | vor zwei Tagen | hace dos días
past | last night | la nuit dernière | letzte Nacht | anoche
past | last Saturday | samedi dernier | letzten Samstag | el sábado pasado
past | at # o'clock | à # heures | um # Uhr | a las #
future | tomorrow | demain | morgen | mañana
future | next week | la semaine prochaine | nächste Woche | la semana que viene
future | this evening | ce soir | heute Abend | esta noche
future | soon | bientôt | bald | pronto
future | in # days | dans # jours | in # Tagen | dentro de # días
future | next Friday | vendredi prochain | nächsten Freitag | el viernes que viene
future | at # o'clock | à # heures | um # Uhr | a las #
"""

# English words that one thing is not at once.
OPPOSITES = [
    {"hot", "cold"}, {"clean", "dirty"}, {"big", "small"}, {"young", "old"}, {"new", "old"}, {"fast", "slow"},
    {"wet", "dry"}, {"light", "heavy"}, {"light", "dark"}, {"light", "thick"}, {"full", "empty"},
    {"sweet", "salty"}, {"calm", "nervous"}, {"green", "ripe"}, {"red", "yellow"}, {"red", "blue"},
    {"red", "white"}, {"blue", "white"},
]  # fmt: skip

# Two to twelve; larger quantities are written in digits.
NUMBERS = {
    "english": ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"],
    "french": ["deux", "trois", "quatre", "cinq", "six", "sept", "*huit", "neuf", "dix", "*onze", "douze"],
    "german": ["zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf"],
    "spanish": ["dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve", "diez", "once", "doce"],
}

TOPIC_TABLES = {
    "kitchen": (KITCHEN_NOUNS, KITCHEN_VERBS, KITCHEN_ADJECTIVES, KITCHEN_PLACES),
    "weather": (WEATHER_NOUNS, WEATHER_VERBS, WEATHER_ADJECTIVES, WEATHER_PLACES),
    "harbour": (HARBOUR_NOUNS, HARBOUR_VERBS, HARBOUR_ADJECTIVES, HARBOUR_PLACES),
    "market": (MARKET_NOUNS, MARKET_VERBS, MARKET_ADJECTIVES, MARKET_PLACES),
}
